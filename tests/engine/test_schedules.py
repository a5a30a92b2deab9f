"""Randomised schedules: whatever else runs, every request's tokens and logprobs are those of its solo run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import Tensor

import gnomon
from gnomon.arch.network import Network, build_network
from gnomon.engine.engine import Engine
from gnomon.engine.request import SamplingParams
from gnomon.engine.runner import PagedRunner
from gnomon.errors import FetchError
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.batch import PAGE, Span
from gnomon.models.reference import open_checkpoint
from helpers.schedules import Record, Seen, compare_schedule, solo
from helpers.tiny import write_tiny_model

KINDS = ["fp32 torch", "bf16 torch", "fp32 native", "bf16 native", "int8 native"]


def tiny_network(folder: Path, kind: str, threads: int = 1) -> Network:
    dtype, kernel = kind.split()
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    return build_network(open_checkpoint(folder), make_operators(dtype, kernel=kernel, threads=threads))


@pytest.fixture(scope="module", params=KINDS)
def network(request: pytest.FixtureRequest, tiny_dir: Path) -> Network:
    return tiny_network(tiny_dir, request.param)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [("fp32 native", 160), ("bf16 native", 160), ("int8 native", 160), ("fp32 torch", 10), ("bf16 torch", 10)],
)
def test_every_request_equals_its_solo_run_bit_for_bit(family: str, kind: str, count: int, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    seen = Seen()
    for threads in (1, 2):
        network = tiny_network(folder, kind, threads)
        for seed in range(count // 2):
            compare_schedule(network, 1000 * threads + seed, seen)
    assert seen.different == []
    assert seen.preemptions > 0 and seen.hits > 0 and seen.chunked > 0 and seen.accepted > 0
    assert seen.largest_batch >= 3 and seen.pauses > 0


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("profile", ["fp32", "bf16", "int8", "gguf"])
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_models_in_250_schedules_each(name: str, profile: str) -> None:
    """Accumulates under benchmarks/results/schedules.json: an interrupted run goes on where it stopped."""
    target = Path(__file__).parents[2] / "benchmarks" / "results" / "schedules.json"
    done = json.loads(target.read_text()) if target.exists() else {}
    key = f"{name} {profile}"
    try:
        model = gnomon.load(name, profile=profile, kernel="native")
    except FetchError as error:
        pytest.skip(str(error))
    with model:
        assert model.network is not None and model.profile is not None
        own = done.get(key, {})
        fresh = own.get("fingerprint") != model.profile.fingerprint
        start, seen = (0, Seen()) if fresh else (own["schedules"], Seen(**own["seen"]))
        for seed in range(start, 250):
            model.network.operators.use_threads(1 + seed % 2)
            compare_schedule(model.network, seed, seen, vocabulary=40_000, brief=True)
            if seed % 10 == 9:
                done[key] = {
                    "fingerprint": model.profile.fingerprint,
                    "schedules": seed + 1,
                    "seen": seen.__dict__,
                }
                target.write_text(json.dumps(done, indent=2) + "\n")
    assert seen.different == []
    assert seen.preemptions > 0 and seen.hits > 0 and seen.chunked > 0 and seen.accepted > 0
    assert seen.largest_batch >= 3


@pytest.mark.parametrize("budget", [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 1])
def test_no_prompt_length_hangs_at_any_budget(network: Network, budget: int) -> None:
    for length in (1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 2 * PAGE + 1):
        record = Record()
        engine = Engine(PagedRunner(network, page_count=3), token_budget=budget)
        engine.submit(record.request(0, [5] * length, SamplingParams(seed=0, max_tokens=2)))
        for _ in range(length + 10):
            engine.step()
        assert record.finished and record.finished[0].reason in ("length", "stop")


def test_a_sequence_put_back_on_admission_does_not_stop_the_step(network: Network) -> None:
    """Seed 1021: the cache revived the last free page for a prompt that then lacked one, and was admitted for ever."""
    seen = Seen()
    compare_schedule(network, 1021, seen)
    assert seen.different == [] and seen.preemptions < 1000


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


def test_choices_of_one_prompt_copy_the_page_it_ends_in(network: Network) -> None:
    """Four choices, 100 tokens of prompt: the first computes them, each other one only the last of them."""
    prompt = [7, 8, 9, 10] * 25
    params = SamplingParams(seed=3, temperature=0.9, max_tokens=4, logprobs=2, ignore_eos=True)
    runner = CountingRunner(network, page_count=16)
    engine = Engine(runner, drafter=None)
    records = [Record() for _ in range(4)]
    for choice, record in enumerate(records):
        engine.submit(record.request(choice, prompt, params, choice))
    while engine.step():
        pass
    assert runner.tokens == 100 + 3 * 1 + 4 * 3
    assert [record.finished[0].cached_tokens for record in records] == [0, 99, 99, 99]
    for choice, record in enumerate(records):
        assert record.events == solo(network, choice, prompt, params, choice, {}).events
    assert len({tuple(token for token, *_ in record.events) for record in records}) > 1
    assert engine.stats().pages_used == 0


def test_a_begun_page_is_not_copied_across_salts(network: Network) -> None:
    runner = CountingRunner(network, page_count=16)
    engine = Engine(runner, drafter=None)
    for number, salt in enumerate(["", "other"]):
        request = Record().request(number, [7] * 40, SamplingParams(seed=0, max_tokens=1, ignore_eos=True))
        request.cache_salt = salt
        engine.submit(request)
    while engine.step():
        pass
    assert runner.tokens == 80


class CountingRunner(PagedRunner):
    """Counts the tokens it computes."""

    tokens = 0

    def step(self, spans: list[Span]) -> list[Tensor]:
        self.tokens += sum(len(span.token_ids) for span in spans)
        return super().step(spans)


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
