"""The native kernels: the same bits on every instruction set, row count, chunking and thread count. Exact."""

from __future__ import annotations

import csv
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import need
from gnomon.errors import UnsupportedModel, UsageError
from gnomon.kernels import _native
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.blocks import BLOCK_TYPES, int8_parts
from gnomon.kernels.native_operators import NativeOperators
from gnomon.kernels.operators import QuantizedTensor
from gnomon.kernels.torch_operators import TorchOperators

ISAS = ["v4vnni", "v4", "v3", "generic"]
ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 33, 64, 65]


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    reason = _native.unavailable_reason()
    need(reason is None, f"the native kernels are missing: {reason}", "GNOMON_REQUIRE_NATIVE")


def operators(dtype: str = "fp32", threads: int = 1, isa: str | None = None) -> NativeOperators:
    try:
        return NativeOperators(dtype, threads, isa=isa)
    except UsageError as error:
        pytest.skip(str(error))


@pytest.fixture(params=[(dtype, threads) for dtype in ("fp32", "bf16") for threads in (1, 2)], ids=str)
def ops(request: pytest.FixtureRequest) -> Iterator[NativeOperators]:
    yield operators(*request.param)


@pytest.mark.parametrize(("n", "k"), [(576, 576), (130, 1536), (77, 41), (3, 5)])
def test_a_linear_row_does_not_depend_on_the_number_of_rows(ops: NativeOperators, n: int, k: int) -> None:
    torch.manual_seed(n)
    weight, x, bias = ops.linear_weight(torch.randn(n, k)), torch.randn(65, k), torch.randn(n)
    whole = ops.linear(x, weight, bias)
    for rows in ROWS:
        assert torch.equal(ops.linear(x[:rows], weight, bias), whole[:rows])
        assert torch.equal(ops.linear(x[-rows:], weight, bias), whole[-rows:])
    exact = x.double() @ weight.data.double().T + bias.double()
    assert (whole - exact).abs().max() < 1e-4 * exact.std()


def everything(ops: NativeOperators) -> list[torch.Tensor]:
    """Every operator once, on awkward shapes and extreme values."""
    torch.manual_seed(0)
    x = torch.randn(19, 90) * 3
    x[0, :6] = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 60.0, -120.0])
    weight, bias = torch.randn(53, 90), torch.randn(53)
    norm, residual = torch.rand(90), torch.randn(19, 90)
    query, key = torch.randn(19, 6, 24), torch.randn(19, 2, 24)
    angle = torch.randn(19, 8)
    keys, values = torch.full((4, 2, PAGE, 24), torch.nan), torch.full((4, 2, PAGE, 24), torch.nan)
    batch = RaggedBatch.build([Span(1, [0] * 12, 0, [2]), Span(2, [0] * 7, 0, [0])])
    ops.write_pages(key, key * 2, keys, values, batch)
    return [
        ops.linear(x, ops.linear_weight(weight), bias),
        ops.rms_norm(x, norm, 1e-6),
        *ops.add_rms_norm(x, residual, norm, 1e-6),
        ops.rotary(query, angle.cos(), angle.sin()),
        ops.silu_mul(x),
        ops.gelu_mul(x),
        ops.embedding(ops.linear_weight(weight), torch.tensor([3, 3, 52])),
        ops.attention(query, keys, values, batch, scale=0.2),
        ops.attention(query, keys, values, batch, scale=0.2, window=5, softcap=20.0),
    ]


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
def test_every_instruction_set_and_thread_count_gives_the_same_bytes(dtype: str) -> None:
    reference = everything(operators(dtype, 1, "generic"))
    compared = 0
    for isa in ISAS:
        for threads in (1, 2, 3):
            found = everything(operators(dtype, threads, isa))
            for ours, theirs in zip(found, reference, strict=True):
                assert ours.numpy().tobytes() == theirs.numpy().tobytes(), isa
            compared += 1
    assert compared >= 3


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("inputs", [16, 90, 576, 581])
def test_few_rows_read_weights_as_streams_with_the_same_bytes_everywhere(dtype: str, inputs: int) -> None:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(24, inputs), torch.randn(131, inputs), torch.randn(131)
    generic = operators(dtype, 1, "generic")
    reference = generic.linear(x, generic.linear_weight(weight), bias)
    for isa in ISAS:
        for threads in (1, 3):
            ops = operators(dtype, threads, isa)
            laid = ops.linear_weight(weight)
            for rows in range(1, 10):
                found = ops.linear(x[:rows], laid, bias)
                assert found.numpy().tobytes() == reference[:rows].numpy().tobytes(), (isa, threads, rows)


def test_flushing_denormals_elsewhere_changes_no_bit() -> None:
    ops = operators(threads=2)
    before = everything(ops)
    torch.set_flush_denormal(True)
    try:
        after = everything(ops)
    finally:
        torch.set_flush_denormal(False)
    assert [t.numpy().tobytes() for t in before[:1]] == [t.numpy().tobytes() for t in after[:1]]


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7])
@pytest.mark.parametrize(("size", "window", "softcap"), [(16, None, None), (40, 70, None), (64, None, 30.0)])
def test_attention_is_the_same_whole_chunked_and_among_strangers(
    ops: NativeOperators, length: int, size: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(length)
    heads, groups = 6, 2
    query = torch.randn(length, heads, size)
    key, value = torch.randn(length, groups, size), torch.randn(length, groups, size)
    pages = [5, 2, 9, 0][: -(-length // PAGE)]

    def run(keys: torch.Tensor, values: torch.Tensor, start: int, count: int, strangers: int) -> torch.Tensor:
        mine, rows = Span(1, [0] * count, start, pages), slice(start, start + count)
        batch = RaggedBatch.build([Span(2, [0] * strangers, 0, [11]), mine] if strangers else [mine])
        noise = torch.randn(strangers, heads, size)
        k, v = torch.cat([noise[:, :groups], key[rows]]), torch.cat([noise[:, :groups] * 1e3, value[rows]])
        ops.write_pages(k, v, keys, values, batch)
        q = torch.cat([noise, query[rows]])
        return ops.attention(q, keys, values, batch, scale=0.25, window=window, softcap=softcap)[strangers:]

    def pool() -> list[torch.Tensor]:
        return [torch.full((12, groups, PAGE, size), torch.nan) for _ in range(2)]

    whole = run(*pool(), 0, length, 0)
    assert torch.isfinite(whole).all()
    for chunk in (3, 17, 64):
        keys, values = pool()
        parts = [run(keys, values, at, min(chunk, length - at), 3) for at in range(0, length, chunk)]
        assert torch.equal(torch.cat(parts), whole)


def test_the_native_and_the_torch_operators_agree_to_rounding() -> None:
    for ours, theirs in zip(everything(operators()), everything(TorchOperators("fp32", 1)), strict=True):  # type: ignore[arg-type]
        assert (ours - theirs).abs().max() <= 2e-5 * max(1.0, float(theirs.abs().max()))


def test_exp_has_the_recorded_bits(data: Path) -> None:
    rows = list(csv.DictReader((data / "determinism-uncertainty" / "golden_exp.csv").open()))
    x = np.array([struct.unpack(">f", bytes.fromhex(row["x_hex"]))[0] for row in rows], np.float32)
    for isa in ISAS:
        y = np.empty_like(x)
        operators(isa=isa).library.gnomon_exp(x.ctypes.data, y.ctypes.data, len(x))
        assert [f"{bits:08x}" for bits in y.view(np.uint32)] == [row["y_hex"] for row in rows]


def test_dot16_has_the_recorded_bits(data: Path) -> None:
    def g(i: int, s: int) -> float:
        return ((((i * 2654435761 + s * 40503 * 65537) % 2**32) >> 8) / 2**24) - 0.5

    rows = list(csv.DictReader((data / "determinism-uncertainty" / "golden_dot16.csv").open()))
    for isa in ISAS:
        ops = operators(isa=isa)
        for row in rows:
            k, n = int(row["K"]), int(row["n"])
            x = torch.tensor([[g(i, 1) for i in range(k)]], dtype=torch.float32)
            w = torch.tensor([[g(i + n * k, 2) for i in range(k)]], dtype=torch.float32)
            y = ops.linear(x, ops.linear_weight(w))
            assert f"{y.numpy().view(np.uint32)[0, 0]:08x}" == row["y_hex"], (isa, k, n)


def test_a_fork_gets_threads_of_its_own() -> None:
    ops = operators(threads=2)
    weight, x = ops.linear_weight(torch.randn(200, 64)), torch.randn(3, 64)
    expected = ops.linear(x, weight)
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(ops.linear(x, weight), expected) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_unknown_instruction_set_is_named() -> None:
    with pytest.raises(UsageError, match="v4vnni, v4, v3, generic"):
        NativeOperators("fp32", 1, isa="v9")


def test_an_unknown_profile_is_named() -> None:
    with pytest.raises(UsageError, match="fp4"):
        NativeOperators("fp4", 1)


def random_blocks(name: str, n: int, k: int) -> QuantizedTensor:
    """Blocks of random bits, with scales of ordinary size."""
    rng = np.random.default_rng(5)
    known = BLOCK_TYPES[name]
    rows = rng.integers(0, 256, (n, k // known.inputs * known.size), dtype=np.uint8)
    blocks = rows.reshape(n, -1, known.size)
    for at in {"Q6_K": [208]}.get(name, [0, 2] if name.endswith(("_1", "4_K", "5_K")) else [0]):
        halves = rng.normal(size=blocks.shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = halves[..., None].view(np.uint8)
    return QuantizedTensor(torch.from_numpy(rows), (n, k), name)


@pytest.mark.parametrize("name", BLOCK_TYPES)
def test_gguf_blocks_keep_their_numbers_and_multiply_alike_everywhere(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    n, k = 37, 768
    blocks = random_blocks(name, n, k)
    values = gguf.quants.dequantize(blocks.rows.numpy(), gguf.GGMLQuantizationType[name])
    exact = torch.from_numpy(np.array(values)).reshape(n, k)
    x = torch.randn(65, k, generator=torch.Generator().manual_seed(2)) * 3
    reference = None
    for isa in ISAS:
        ops = operators("gguf", 2, isa)
        weight = ops.linear_weight(blocks)
        assert torch.equal(ops.embedding(weight, torch.arange(n)), exact)
        whole = ops.linear(x, weight)
        for rows in ROWS:
            assert torch.equal(ops.linear(x[:rows], weight), whole[:rows])
            assert torch.equal(ops.linear(x[-rows:], weight), whole[-rows:])
        reference = whole if reference is None else reference
        assert whole.numpy().tobytes() == reference.numpy().tobytes(), isa
    assert reference is not None
    assert (reference - x @ exact.T).norm() < 0.02 * (x @ exact.T).norm()


def quantized_product(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The int8 profile's definition, written out in numpy: groups of 64, integer dots, one fused step per group."""
    parts = int8_parts(weight)
    out = np.zeros((len(x), len(weight)))
    for g in range(0, x.shape[1], 64):
        piece = x[:, g : g + 64]
        scale = np.abs(piece).max(axis=1, keepdims=True) / np.float32(127)
        q = np.rint(piece / np.where(scale > 0, scale, np.float32(1))).astype(np.int64)
        dots = q @ (parts.q[:, g : g + 64].astype(np.int64) - 128).T
        step = (scale * parts.scales[:, g // 64][None]).astype(np.float32)
        out = (dots.astype(np.float64) * step.astype(np.float64) + out).astype(np.float32).astype(np.float64)
    return out.astype(np.float32)


def test_int8_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    x, weight = rng.normal(size=(9, 192)).astype(np.float32), rng.normal(size=(40, 192)).astype(np.float32)
    ops = operators("int8")
    ours = ops.linear(torch.from_numpy(x), ops.linear_weight(torch.from_numpy(weight))).numpy()
    assert ours.tobytes() == quantized_product(x, weight).tobytes()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e-40, 0.0])
def test_int8_rows_with_extreme_values_stay_in_their_row(bad: float) -> None:
    ops = operators("int8")
    x = torch.randn(3, 128)
    weight = ops.linear_weight(torch.randn(5, 128))
    before = ops.linear(x, weight)
    x[1] = 0.0
    x[1, 70] = bad
    after = ops.linear(x, weight)
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    if np.isfinite(bad):
        assert torch.equal(after[1], torch.zeros(5))
    else:
        assert bool(after[1].isnan().all())


def test_a_block_type_that_is_not_run_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="Q2_K"):
        operators("gguf").linear_weight(QuantizedTensor(torch.zeros(4, 84, dtype=torch.uint8), (4, 256), "Q2_K"))
