"""The noise and the draw: published vectors, exact edges, and the right distribution."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gnomon.engine.philox import gumbel, uniform
from gnomon.engine.request import Request, SamplingParams
from gnomon.engine.sampler import RequestSampler


def sampler(**params: object) -> RequestSampler:
    defaults: dict[str, object] = {"seed": 0, "max_tokens": 100000}
    return RequestSampler(Request("r", [1], SamplingParams(**(defaults | params))), 8)  # type: ignore[arg-type]


def test_the_extreme_draws_stay_strictly_inside_zero_and_one() -> None:
    u = uniform(np.array([0, 0xFFFFFFFF], dtype=np.uint32))
    assert 0 < u[0] < u[1] < 1
    assert u[0] == 0.5 * 2.0**-32 and u[1] == 1 - 0.5 * 2.0**-32
    assert np.isfinite(gumbel(u)).all()
    assert gumbel(u)[0] == pytest.approx(-math.log(-math.log(u[0])), abs=1e-12)


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    assert sampler().draw(torch.tensor([0.0, 3.0, 1.0, 3.0, 0, 0, 0, 0])).token_id == 1


def test_a_masked_token_is_never_drawn_even_at_high_temperature() -> None:
    logits = torch.tensor([0.0] * 7 + [-torch.inf])
    drawing = sampler(temperature=2.0)
    for _ in range(500):
        token = drawing.draw(logits.clone()).token_id
        drawing.accept(token)
        assert token != 7


def test_draws_follow_the_softmax_and_repeat_with_the_seed() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, 0.5, -1.0, 0.0, 0.0, 0.0])
    drawing, again = sampler(temperature=1.0, seed=5), sampler(temperature=1.0, seed=5)
    counts = np.zeros(8)
    for _ in range(4000):
        token = drawing.draw(logits.clone()).token_id
        assert again.draw(logits.clone()).token_id == token
        drawing.accept(token)
        again.accept(token)
        counts[token] += 1
    assert np.abs(counts / 4000 - logits.softmax(-1).numpy()).max() < 0.03


def test_top_k_top_p_and_min_p_keep_what_they_say() -> None:
    logits = torch.log(torch.tensor([0.4, 0.3, 0.2, 0.05, 0.05, 1e-9, 1e-9, 1e-9]))

    def kept(**params: float) -> set[int]:
        drawing = sampler(temperature=1.0, **params)
        seen = set()
        for _ in range(400):
            token = drawing.draw(logits.clone()).token_id
            drawing.accept(token)
            seen.add(token)
        return seen

    assert kept(top_k=2) == {0, 1}
    assert kept(top_p=0.65) == {0, 1}
    assert kept(min_p=0.4) == {0, 1, 2}
    assert kept(top_k=3, top_p=0.5) == {0, 1}


def test_penalties_are_those_of_the_field() -> None:
    drawing = sampler(repetition_penalty=2.0, logprobs=1)
    drawing.accept(3)
    logits = torch.tensor([0.0, 4.0, 3.0, 4.0, -1.0, 0, 0, 0])  # 1 is in the prompt, 3 was generated
    draw = drawing.draw(logits)
    assert draw.token_id == 2
    assert draw.top[0][0] == 1  # logprobs are taken before penalties
    frequent = sampler(frequency_penalty=1.0)
    for _ in range(3):
        frequent.accept(1)
    assert frequent.draw(torch.tensor([0.0, 2.9, 0.1, 0, 0, 0, 0, 0])).token_id == 2
