"""Speculation changes when tokens come, never which: the same ids, log-probabilities and ends, fewer steps."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from gnomon.arch.network import Network, build_network
from gnomon.engine.draft_model import DraftModel
from gnomon.engine.drafting import LONGEST, AdaptiveLength, Choose, PromptLookup
from gnomon.engine.engine import Engine
from gnomon.engine.pages import PagePool
from gnomon.engine.request import Decision, Request, SamplingParams, TokenEvent
from gnomon.engine.runner import PagedRunner
from gnomon.errors import UsageError
from gnomon.kernels import make_operators, native_reason
from gnomon.loading import load
from gnomon.models.reference import open_checkpoint
from helpers.schedules import Record
from helpers.tiny import write_tiny_model


@pytest.fixture(scope="module")
def network(tiny_dir: Path) -> Network:
    return build_network(open_checkpoint(tiny_dir), make_operators("fp32", threads=1))


class Oracle:
    """Guesses what it was told will come."""

    def __init__(self, text: list[int]) -> None:
        self.text = text

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        return self.text[len(tokens) : len(tokens) + most]

    def close(self) -> None:
        """Nothing to free."""


def no_choice(logits_V: Tensor, ahead: int) -> int:
    raise AssertionError("lookup looks at no logits")


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
    assert lookup.propose([1, 2, 3], 4, no_choice) == []
    assert lookup.propose([1, 2, 3, 9, 1, 2, 3], 3, no_choice) == [9, 1, 2]
    assert lookup.propose([1, 2, 3, 9, 1, 2, 3, 8, 1, 2, 3], 1, no_choice) == [8]
    assert lookup.propose([4, 4, 4, 4], 5, no_choice) == [4] * 5  # rolled back to another text


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


def drafting(folder: Path) -> DraftModel:
    """The tiny network in int8, as a guesser."""
    if (reason := native_reason()) is not None:
        pytest.skip(reason)
    return DraftModel(build_network(open_checkpoint(folder), make_operators("int8", kernel="native", threads=1)), 512)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_draft_model_saves_steps_and_changes_nothing(network: Network, tiny_dir: Path, temperature: float) -> None:
    prompt = [(7919 * place) % 290 for place in range(90)]
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=40, logprobs=2)
    plain, fast, model = Record(), Record(), drafting(tiny_dir)
    slow = run(network, plain.request(0, prompt, params), None)
    quick = run(network, fast.request(0, prompt, params), model.drafter)
    assert plain.events == fast.events
    assert quick.steps < slow.steps * 2 / 3  # at a temperature too: the guesser draws with the sequence's own noise
    assert model.pool.used == 0


def test_a_draft_model_without_room_says_nothing(network: Network, tiny_dir: Path) -> None:
    model = drafting(tiny_dir)
    model.pool = PagePool(1, "")
    params = SamplingParams(temperature=0.8, seed=4, max_tokens=12)
    plain, record = Record(), Record()
    slow = run(network, plain.request(0, [5, 6, 7, 8] * 30, params), None)
    engine = run(network, record.request(0, [5, 6, 7, 8] * 30, params), model.drafter)
    assert record.events == plain.events and engine.steps == slow.steps
    assert model.pool.used == 0


def test_a_draft_model_serves_a_crowd_that_comes_and_goes(network: Network, tiny_dir: Path) -> None:
    model = drafting(tiny_dir)
    jobs = [
        (n, [5 + n, 6, 7, 8] * (30 if n == 4 else 15), SamplingParams(temperature=0.8, seed=n, max_tokens=12))
        for n in range(5)
    ]
    alone = {}
    for number, prompt, params in jobs:
        record = alone[number] = Record()
        run(network, record.request(number, prompt, params), None)
    engine = Engine(PagedRunner(network, page_count=6), max_sequences=3, drafter=model.drafter)
    records = [Record() for _ in jobs]
    for (number, prompt, params), record in zip(jobs, records, strict=True):
        engine.submit(record.request(number, prompt, params))
    engine.step()
    engine.cancel("2")
    while engine.step():
        pass
    for number, record in enumerate(records):
        assert number == 2 or record.events == alone[number].events
    assert engine.accepted_tokens > 0
    assert model.pool.used == 0


def test_loading_with_a_draft_of_the_same_weights(tiny_dir: Path, tmp_path: Path) -> None:
    drafting(tiny_dir)  # skips without native kernels
    with load(tiny_dir, threads=1, speculation="off") as plain, load(tiny_dir, threads=1, speculation="draft") as fast:
        expected = plain.generate("the", max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
        given = fast.generate("the", max_tokens=24, temperature=0.8, seed=3, ignore_eos=True)
        assert given.token_ids == expected.token_ids and given.fingerprint == expected.fingerprint
        assert fast.stats().accepted_tokens > 0
    other = write_tiny_model(tmp_path / "other", vocab_size=310)
    with pytest.raises(UsageError, match="310 tokens, this one 300"):
        load(tiny_dir, threads=1, speculation=f"draft:{other}")
    with pytest.raises(UsageError, match="lookup, off, draft, draft:REF"):
        load(tiny_dir, threads=1, speculation="magic")
