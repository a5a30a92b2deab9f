"""Randomised schedules: whatever else runs, every request's tokens and logprobs are those of its solo run."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from gnomon.arch.network import Network, build_network
from gnomon.engine.engine import Engine
from gnomon.engine.request import Decision, Finished, PromptLogprob, Request, SamplingParams, TokenEvent
from gnomon.engine.runner import PagedRunner
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.batch import PAGE
from gnomon.models.reference import open_checkpoint


@dataclass
class Record:
    """What one request saw."""

    events: list[tuple[int, float | None, tuple[tuple[int, float], ...]]] = field(default_factory=list)
    prompt: list[PromptLogprob] = field(default_factory=list)
    finished: list[Finished] = field(default_factory=list)

    def request(self, number: int, prompt: list[int], params: SamplingParams, index: int = 0) -> Request:
        def on_token(event: TokenEvent) -> Decision:
            self.events.append((event.token_id, event.logprob, event.top))
            return Decision.CONTINUE

        return Request(
            id=str(number),
            prompt_ids=prompt,
            sampling=params,
            stream_index=index,
            on_token=on_token,
            on_prompt=self.prompt.extend,
            on_finish=self.finished.append,
        )


@pytest.fixture(scope="module", params=["fp32 torch", "bf16 torch", "fp32 native", "bf16 native"])
def network(request: pytest.FixtureRequest, tiny_dir: Path) -> Network:
    dtype, kernel = request.param.split()
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    return build_network(open_checkpoint(tiny_dir), make_operators(dtype, kernel=kernel, threads=1))


def params_for(rng: random.Random) -> SamplingParams:
    greedy = rng.random() < 0.3
    return SamplingParams(
        temperature=0.0 if greedy else rng.choice([0.3, 0.8, 1.4]),
        top_k=rng.choice([0, 0, 5, 40]),
        top_p=rng.choice([1.0, 0.9, 0.5]),
        min_p=rng.choice([0.0, 0.05]),
        repetition_penalty=rng.choice([1.0, 1.3]),
        frequency_penalty=rng.choice([0.0, 0.4]),
        seed=rng.randrange(2**64),
        max_tokens=rng.randint(1, 12),
        logprobs=rng.choice([None, 0, 3]),
        prompt_logprobs=rng.choice([None, None, None, 1]),
        eos_token_ids=frozenset({2}),
    )


def solo(network: Network, number: int, prompt: list[int], params: SamplingParams, index: int) -> Record:
    record = Record()
    engine = Engine(PagedRunner(network, page_count=8), token_budget=1000)
    engine.submit(record.request(number, prompt, params, index))
    while engine.step():
        pass
    return record


def test_every_request_equals_its_solo_run_bit_for_bit(network: Network) -> None:
    preemptions = hits = chunked = 0
    largest = 0
    for seed in range(25):
        rng = random.Random(seed)
        shared = [rng.randrange(3, 290) for _ in range(rng.choice([0, 64, 130]))]
        jobs = []
        for number in range(rng.randint(2, 9)):
            own = [rng.randrange(3, 290) for _ in range(rng.choice([1, 5, PAGE - 1, PAGE, PAGE + 1, 100]))]
            prompt = (shared if rng.random() < 0.7 else []) + own
            jobs.append((number, prompt, params_for(rng), rng.randrange(3)))
        budget = rng.choice([1, 3, 16, 17, 64, 257])
        engine = Engine(
            PagedRunner(network, page_count=rng.choice([4, 5, 40])),
            max_sequences=rng.choice([2, 4, 16]),
            token_budget=budget,
        )
        records = {number: Record() for number, *_ in jobs}
        waiting = list(jobs)
        cancelled: set[int] = set()
        while waiting or engine.sequences:
            while waiting and rng.random() < 0.5:
                number, prompt, params, index = waiting.pop(0)
                engine.submit(records[number].request(number, prompt, params, index))
            if engine.sequences and rng.random() < 0.02:
                victim = rng.choice(list(engine.sequences))
                cancelled.add(int(victim))
                engine.cancel(victim)
            engine.step()
        for number, prompt, params, index in jobs:
            record = records[number]
            assert len(record.finished) == 1
            alone = solo(network, number, prompt, params, index)
            if number in cancelled:
                assert record.events == alone.events[: len(record.events)]
                continue
            assert record.events == alone.events
            assert record.prompt == alone.prompt
            assert record.finished[0].reason == alone.finished[0].reason
            chunked += len(prompt) > budget
        stats = engine.stats()
        assert stats.pages_used == 0
        assert stats.running == stats.waiting == 0
        preemptions += stats.preemptions
        hits += stats.cached_tokens
        largest = max(largest, stats.largest_batch)
    assert preemptions > 0 and hits > 0 and chunked > 0 and largest >= 4  # otherwise the test proved nothing


@pytest.mark.parametrize("budget", [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 1])
def test_no_prompt_length_hangs_at_any_budget(network: Network, budget: int) -> None:
    for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1):
        record = Record()
        engine = Engine(PagedRunner(network, page_count=3), token_budget=budget)
        engine.submit(record.request(0, [5] * length, SamplingParams(seed=0, max_tokens=2)))
        for _ in range(length + 10):
            engine.step()
        assert record.finished and record.finished[0].reason in ("length", "stop")


def test_a_warm_prefix_gives_the_same_bits_as_a_cold_one(network: Network) -> None:
    engine = Engine(PagedRunner(network, page_count=16))
    prompt = [7, 8, 9, 10] * 50
    params = SamplingParams(seed=3, temperature=0.9, max_tokens=8, logprobs=2)
    records = []
    for number in range(2):
        record = Record()
        engine.submit(record.request(number, prompt, params))
        while engine.step():
            pass
        records.append(record)
    assert records[0].finished[0].cached_tokens == 0
    assert records[1].finished[0].cached_tokens == 192
    assert records[0].events == records[1].events


def test_changed_weights_flush_the_cache(network: Network) -> None:
    engine = Engine(PagedRunner(network, page_count=16))
    record = Record()
    engine.submit(record.request(0, [7] * 130, SamplingParams(seed=0, max_tokens=1)))
    while engine.step():
        pass
    engine.weights_changed("fp_other")
    again = Record()
    engine.submit(again.request(1, [7] * 130, SamplingParams(seed=0, max_tokens=1)))
    while engine.step():
        pass
    assert again.finished[0].cached_tokens == 0
