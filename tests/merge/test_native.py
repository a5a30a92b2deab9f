"""The native merging kernels give the bits of torch's expressions, on every instruction set. Exact."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import gnomon.merge.blocks
import gnomon.merge.select
from conftest import need
from gnomon.errors import UsageError
from gnomon.kernels import _native, merging
from gnomon.merge import method
from gnomon.merge.blocks import chunk_sums, total
from gnomon.merge.randomness import CounterRandomness

METHODS = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
           "slerp", "nuslerp", "multislerp", "karcher", "model_stock", "linear"]  # fmt: skip
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _native_is_built() -> None:
    reason = _native.unavailable_reason()
    need(reason is None, f"the native kernels are missing: {reason}", "GNOMON_REQUIRE_NATIVE")


@pytest.fixture(params=[None, "v3", "generic"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str | None]:
    """The best instruction set, then others."""
    if request.param is not None:
        try:
            library = _native.open_library(request.param)
        except UsageError as error:
            pytest.skip(str(error))
        for name, (arguments, result) in merging.SIGNATURES.items():
            getattr(library, name).argtypes, getattr(library, name).restype = arguments, result
        monkeypatch.setattr(merging, "_library", lambda: library)
    yield request.param


def case(name: str, dtype: torch.dtype, seed: int) -> tuple[list[torch.Tensor], torch.Tensor, dict[str, Any]]:
    """Tensors with ties, zeros and signed zeros, and parameters."""
    draw = random.Random(f"{name} {dtype} {seed}")
    generator = torch.Generator().manual_seed(seed)
    shape = draw.choice([(1,), (5, 7), (40, 33), (9, 4, 65), (3000,)])
    count = 1 if name == "slerp" else 2 if name == "nuslerp" else draw.randint(2, 4)
    base = torch.randn(shape, generator=generator)
    tensors = [base + 0.3 * torch.randn(shape, generator=generator) for _ in range(count)]
    if draw.random() < 0.5:  # coarse values: many equal magnitudes
        base, *tensors = [(4 * tensor).round() / 4 for tensor in (base, *tensors)]
        base = torch.where(base == 0, -base, base)
    parameters: dict[str, Any] = {}
    if name == "slerp":
        parameters["t"] = 0.37
    elif name not in ("karcher", "model_stock"):
        parameters["weight"] = [round(draw.uniform(-0.3, 1.2), 2) for _ in tensors]
    if name in METHODS[:7]:
        parameters |= {"normalize": draw.random() < 0.5, "lambda": draw.choice([1.0, 0.7])}
    if name in METHODS[1:6]:
        parameters["density"] = [draw.choice([0.0, 0.1, 0.5, 0.83, 1.0]) for _ in tensors]
    if name in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        parameters["rescale"] = draw.random() < 0.5
    if name in ("dare_linear", "dare_ties"):
        parameters["rescale"] = draw.choice(["l1", "inverse_density", "false"])
    if name == "della":
        parameters |= {"density": 0.5, "epsilon": 0.1}
    return [tensor.to(dtype) for tensor in tensors], base.to(dtype), parameters


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.int32 if tensor.dtype is torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_a_method_gives_the_same_bits_without_the_native_kernels(
    name: str, dtype: torch.dtype, isa: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gnomon.merge.blocks, "BLOCK_ELEMENTS", 512)
    monkeypatch.setattr(gnomon.merge.select, "SAMPLE", 64)
    for seed in range(6):
        tensors, base, parameters = case(name, dtype, seed)
        given = None if name in ("linear", "karcher") else base
        native = method(name)(tensors, base=given, seed=seed, **parameters)
        with monkeypatch.context() as patched:
            patched.setattr(merging, "available", lambda: False)
            plain = method(name)(tensors, base=given, seed=seed, **parameters)
        assert torch.equal(bits(native), bits(plain)), (seed, parameters)


@pytest.mark.parametrize("start", [0, 1, 7, 16, 1023, 2**33 + 5])
def test_the_draws_are_numpys_philox(start: int, isa: str | None) -> None:
    source, base, count = CounterRandomness(11), torch.zeros(3001), 3001
    key, step = np.array(source.key("w", 2), dtype=np.uint64), start // 16
    halves = np.random.Philox(key=key, counter=step).random_raw(760).astype("<u8").view("<u2")[start % 16 :][:count]
    open_at = 2900  # a bound that leaves this element's draw open after 16 bits
    for below in (0, round(0.3 * 2**32), int(halves[open_at]) * 2**16 + 2**15, 2**32):
        wanted = halves < below >> 16
        for place in np.flatnonzero(halves == below >> 16):
            more = np.random.Philox(key=key, counter=2**64 + start + int(place)).random_raw(1)
            wanted[place] = more[0] % 2**16 < below % 2**16
        assert (source.kept("w", 2, start, count, below) == wanted).all()
        drawn, sums = merging.drop(base, base + 1, source.key("w", 2), start, below)
        unpacked = (drawn[:, None] >> torch.arange(8) & 1).reshape(-1)[:count].bool()
        assert torch.equal(unpacked, torch.from_numpy(wanted)), below
        assert sums.sum(0).tolist() == [count, int(wanted.sum())]


def test_the_second_sixteen_bits_decide_as_often_as_they_should() -> None:
    source, count = CounterRandomness(5), 1 << 17
    key = np.array(source.key("w", 0), dtype=np.uint64)
    halves = np.random.Philox(key=key, counter=0).random_raw(count // 4).astype("<u8").view("<u2")
    for high in (3, 40_000):
        at = halves == high
        assert at.any()
        assert not source.kept("w", 0, 0, count, high << 16)[at].any()
        assert source.kept("w", 0, 0, count, (high << 16) + 2**16 - 1)[at].all()


def test_sums_are_in_one_order_whatever_computes_them(isa: str | None) -> None:
    for count in (1, 15, 16, 17, 1023, 1024, 1025, 5000):
        values = torch.randn(count, generator=torch.Generator().manual_seed(count)) * 1e3
        assert torch.equal(merging.sums(values), chunk_sums(values))
    backwards = chunk_sums(values.flip(0)).sum()
    assert total(values) == pytest.approx(float(backwards)) and total(values) != float(values.sum())


def test_not_a_number_and_infinity_are_found_wherever_they_stand(isa: str | None) -> None:
    for dtype in DTYPES:
        for bad in (float("nan"), float("inf"), -float("inf")):
            for place in (0, 17, 99):
                values = torch.full((100,), torch.finfo(dtype).max).to(dtype)
                assert merging.finite(values)
                values[place] = bad
                assert not merging.finite(values)
