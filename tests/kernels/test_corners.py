"""The corners: every row count to 64, more threads than processors, odd head sizes, 8k keys, compiled code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import gnomon
from conftest import need
from gnomon.engine.engine import Engine
from gnomon.engine.request import SamplingParams
from gnomon.engine.runner import PagedRunner
from gnomon.errors import UsageError
from gnomon.kernels import _native, library
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.native_operators import NativeOperators
from helpers.schedules import Record
from helpers.tiny import write_tiny_model


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    reason = _native.unavailable_reason()
    need(reason is None, f"the native kernels are missing: {reason}", "GNOMON_REQUIRE_NATIVE")


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_row_count_from_1_to_64_gives_each_row_its_own_bits(dtype: str) -> None:
    ops = NativeOperators(dtype, 2)
    torch.manual_seed(3)
    x, weight = torch.randn(64, 200), ops.linear_weight(torch.randn(149, 200))
    whole = ops.linear(x, weight)
    for rows in range(1, 65):
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows]), rows


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_more_threads_than_processors_change_no_bit(dtype: str) -> None:
    torch.manual_seed(4)
    x, dense = torch.randn(33, 130), torch.randn(500, 130)
    results = []
    try:
        for threads in (1, 7, 32):
            ops = NativeOperators(dtype, threads)
            weight = ops.linear_weight(dense)
            results.append([ops.linear(x, weight), ops.linear(x[:1], weight), ops.silu_mul(x)])
    finally:
        NativeOperators(dtype, 2)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def attended(
    ops: NativeOperators, size: int, length: int, rows: int, together: int, window: int | None, groups: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """The last `rows` tokens' attention, `together` tokens at a time, and the same in float64."""
    torch.manual_seed(size)
    heads = 3 * groups
    key, value = torch.randn(length, groups, size), torch.randn(length, groups, size)
    query = torch.randn(length, heads, size)
    count = -(-length // PAGE)
    pages = [int(page) for page in np.random.default_rng(1).permutation(count)]
    keys, values = (torch.full((count, groups, PAGE, size), torch.nan) for _ in range(2))
    ops.write_pages(key, value, keys, values, RaggedBatch.build([Span(1, [0] * length, 0, pages)]))
    found = []
    for at in range(length - rows, length, together):
        batch = RaggedBatch.build([Span(1, [0] * min(together, length - at), at, pages)])
        q = query[at : at + together]
        found.append(ops.attention(q, keys, values, batch, scale=0.3, window=window))
    expected = []
    for at in range(length - rows, length):
        seen = slice(max(0, at + 1 - window) if window else 0, at + 1)
        k, v = (x[seen].double().repeat_interleave(3, dim=1) for x in (key, value))
        weights = (torch.einsum("hd,jhd->hj", query[at].double(), k) * 0.3).softmax(-1)
        expected.append(torch.einsum("hj,jhd->hd", weights, v).flatten())
    return torch.cat(found), torch.stack(expected)


@pytest.mark.parametrize("size", [1, 3, 17, 33, 80, 96, 100, 192])
def test_heads_of_any_size_attend_alike_alone_and_together(size: int) -> None:
    for window in (None, 70):
        whole, exact = attended(NativeOperators("fp32", 2), size, 150, 60, 60, window, groups=2)
        assert (whole - exact).abs().max() < 1e-4
        for together in (1, 9, 31):
            again, _ = attended(NativeOperators("fp32", 1), size, 150, 60, together, window, groups=2)
            assert torch.equal(again, whole)
        for isa in ("v3", "generic"):
            try:
                ops = NativeOperators("fp32", 1, isa=isa)
            except UsageError:
                continue
            assert torch.equal(attended(ops, size, 150, 60, 60, window, groups=2)[0], whole), isa


@pytest.mark.parametrize("window", [None, 512])
def test_the_last_of_8192_keys_are_attended_alike_alone_and_together(window: int | None) -> None:
    alone, exact = attended(NativeOperators("fp32", 1), 16, 8192, 40, 1, window)
    together, _ = attended(NativeOperators("fp32", 2), 16, 8192, 40, 40, window)
    assert torch.equal(alone, together)
    assert (alone - exact).abs().max() < 1e-4


def test_a_prompt_of_8000_tokens_is_the_same_in_small_chunks_large_ones_and_from_the_cache(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "long", "gemma3", max_position_embeddings=8192)
    prompt = [3 + 7 * i % 290 for i in range(8000)]
    answers = []
    with gnomon.load(folder, threads=2, ledger=False) as model:
        assert model.network is not None
        for budget in (256, 1000):
            engine = Engine(PagedRunner(model.network, page_count=140), token_budget=budget, drafter=None)
            for number in range(2):
                record = Record()
                engine.submit(record.request(number, prompt, SamplingParams(seed=1, max_tokens=4, logprobs=3)))
                while engine.step():
                    pass
                answers.append(record)
    assert answers[1].finished[0].cached_tokens == 7936
    assert all(record.events == answers[0].events for record in answers[1:])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_code_calls_the_canonical_operators_and_gets_their_bits(backend: str) -> None:
    torch.manual_seed(5)
    x, weight, norm = torch.randn(5, 24), torch.randn(30, 24), torch.rand(24)

    def work(x: torch.Tensor) -> torch.Tensor:
        normed = library.rms_norm(x, norm, 1e-6, "native/fp32")
        return library.linear(normed + 1, weight, None, "native/fp32") * 2

    compiled = torch.compile(work, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x), work(x))


def test_a_compiled_module_beside_the_engine_changes_no_token(tmp_path: Path) -> None:
    with gnomon.load(write_tiny_model(tmp_path / "m"), threads=2, ledger=False) as model:
        options = {"max_tokens": 8, "temperature": 0.8, "seed": 3, "logprobs": 2}
        before = model.generate([5, 6, 7], **options)
        with model.module() as module, torch.no_grad():
            compiled = torch.compile(module, backend="aot_eager")
            ids = torch.tensor([[5, 6, 7]])
            ours = module(ids, use_cache=False).logits
            assert torch.allclose(compiled(ids, use_cache=False).logits, ours, atol=1e-4)
        after = model.generate([5, 6, 7], **options)
    assert (before.token_ids, before.logprobs) == (after.token_ids, after.logprobs)
