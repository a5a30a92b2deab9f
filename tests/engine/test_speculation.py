"""Speculation changes when tokens come, never which: the same ids, log-probabilities and ends, fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest

from gnomon.arch.network import Network, build_network
from gnomon.engine.drafting import LONGEST, AdaptiveLength, PromptLookup
from gnomon.engine.engine import Engine
from gnomon.engine.request import Decision, Request, SamplingParams, TokenEvent
from gnomon.engine.runner import PagedRunner
from gnomon.kernels import make_operators
from gnomon.models.reference import open_checkpoint
from helpers.schedules import Record


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    return build_network(open_checkpoint(tiny_dir), make_operators("fp32", threads=1))


class Oracle:
    """Guesses what it was told will come."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def propose(self, tokens: list[int], most: int) -> list[int]:
        return self.text[len(tokens) : len(tokens) + most]


def run(network: Network, request: Request, drafter: object) -> Engine:
    engine = Engine(PagedRunner(network, page_count=8), drafter=drafter)  # type: ignore[arg-type]
    engine.submit(request)
    while engine.step():
        pass
    return engine


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_right_guesses_save_steps_and_change_nothing(network: Network, temperature: float) -> None:
    prompt = [5, 6, 7, 8] * 12
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=40, logprobs=2)
    plain, fast, wrong = Record(), Record(), Record()
    slow = run(network, plain.request(0, prompt, params), None)
    text = prompt + [event[0] for event in plain.events]
    quick = run(network, fast.request(0, prompt, params), lambda: Oracle(text))
    misled = run(network, wrong.request(0, prompt, params), lambda: Oracle([(t + 1) % 290 for t in text]))
    assert plain.events == fast.events == wrong.events
    assert quick.steps < slow.steps / 3 and quick.accepted_tokens > 30
    assert misled.steps == slow.steps and misled.accepted_tokens == 0


def test_the_end_and_a_rollback_inside_a_draft_are_obeyed(network: Network) -> None:
    prompt = [5, 6, 7, 8] * 12
    params = SamplingParams(temperature=0.9, seed=1, max_tokens=30)
    plain = Record()
    run(network, plain.request(0, prompt, params), None)
    text = prompt + [event[0] for event in plain.events]
    stop = SamplingParams(temperature=0.9, seed=1, max_tokens=30, stop_token_ids=frozenset({plain.events[11][0]}))
    results = []
    for drafter in (None, lambda: Oracle(text)):
        record = Record()
        run(network, record.request(0, prompt, stop), drafter)
        taken: list[int] = []
        rolled: list[bool] = []

        def on_token(event: TokenEvent, taken: list[int] = taken, rolled: list[bool] = rolled) -> Decision:
            taken.append(event.token_id)
            if event.index == 9 and not rolled:
                rolled.append(True)
                return Decision.rollback(3)
            return Decision.CONTINUE

        run(network, Request(id="r", prompt_ids=prompt, sampling=params, on_token=on_token), drafter)
        results.append((record.events, record.finished[0].reason, taken))
    assert results[0] == results[1]
    assert len(results[0][0]) <= 12


def test_lookup_finds_the_latest_occurrence_and_unrolls_loops() -> None:
    lookup = PromptLookup()
    assert lookup.propose([1, 2, 3], 4) == []
    assert lookup.propose([1, 2, 3, 9, 1, 2, 3], 3) == [9, 1, 2]
    assert lookup.propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 1) == [8]
    assert lookup.propose([4, 4, 4, 4], 5) == [4] * 5  # rolled back to another text


def test_the_length_of_drafts_follows_their_success() -> None:
    length = AdaptiveLength()
    for _ in range(5):
        length.learn(4, 4)
    assert length.length == LONGEST
    for _ in range(4):
        length.learn(4, 0)
    assert length.length == 1
    length.learn(1, 0)
    length.learn(1, 0)
    assert [length.next() for _ in range(4)] == [0, 0, 1, 1]
