"""The certificate finds what it should, and the sentinel rings; each defect is injected for real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gnomon.arch.network import Network, build_network
from gnomon.engine.certificate import Certificate, certified, certify
from gnomon.engine.engine import Engine
from gnomon.engine.request import SamplingParams
from gnomon.engine.runner import PagedRunner
from gnomon.engine.sampler import RequestSampler
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.operators import LinearWeight, Operators
from gnomon.models.reference import open_checkpoint
from helpers.schedules import Record


def network_of(folder: Path, kind: str = "fp32 torch") -> Network:
    dtype, kernel = kind.split()
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    return build_network(open_checkpoint(folder), make_operators(dtype, kernel=kernel, threads=1))


@pytest.mark.parametrize("kind", ["fp32 torch", "fp32 native", "bf16 native", "int8 native"])
def test_every_profile_passes_and_says_what_it_compared(tiny_dir: Path, kind: str) -> None:
    certificate = certify(network_of(tiny_dir, kind), "fp_x", {})
    assert certificate.passed, certificate.probes
    assert sum(probe.compared for probe in certificate.probes) > 50
    assert Certificate.from_dict(certificate.as_dict()) == certificate
    assert certify(network_of(tiny_dir, kind), "fp_x", {}).digest == certificate.digest


Patch = Callable[[pytest.MonkeyPatch, Any], None]


def product_by_rows(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """A one-row product takes another path: the sum over K is split."""
    plain = ops.linear

    def linear(x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        if len(x_TK) > 1 or weight.tensor is None:
            return plain(x_TK, weight, bias_N)  # type: ignore[no-any-return]
        half = weight.k // 2
        both = x_TK[:, :half] @ weight.tensor[:, :half].float().T, x_TK[:, half:] @ weight.tensor[:, half:].float().T
        return both[0] + both[1] + (0 if bias_N is None else bias_N)

    patch.setattr(ops, "linear", linear)


def product_split_by_batch(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """Split-K from a number of rows on."""
    plain = ops.linear

    def linear(x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        if len(x_TK) < 32 or weight.tensor is None:
            return plain(x_TK, weight, bias_N)  # type: ignore[no-any-return]
        parts = [x_TK[:, k::4] @ weight.tensor[:, k::4].float().T for k in range(4)]
        return sum(parts[1:], parts[0]) + (0 if bias_N is None else bias_N)

    patch.setattr(ops, "linear", linear)


def attention_split_by_rows(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """Attention whose rounding follows the number of query rows, as split-KV by load does."""
    plain = ops.attention

    def attention(query_THD: Tensor, *arguments: Any, **options: Any) -> Tensor:
        out: Tensor = plain(query_THD, *arguments, **options)
        return out * torch.tensor(3.0) / 3.0 if len(query_THD) < 4 else out

    patch.setattr(ops, "attention", attention)


def unfused_norm(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """A fused residual norm with an association of its own."""

    def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + residual
        return total * weight * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps), total

    patch.setattr(ops, "add_rms_norm", add_rms_norm)


def scalar_tail(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """A gate whose last elements are computed by another formula when rows are few."""
    plain = ops.silu_mul

    def silu_mul(gate_up_T2F: Tensor) -> Tensor:
        out: Tensor = plain(gate_up_T2F)
        size = out.shape[1]
        if len(out) < 3:
            gate, up = gate_up_T2F[:, size - 5 : size], gate_up_T2F[:, 2 * size - 5 :]
            out[:, -5:] = gate.double().sigmoid().mul(gate).mul(up).float()
        return out

    patch.setattr(ops, "silu_mul", silu_mul)


def noise_in_batch_order(patch: pytest.MonkeyPatch, ops: Any) -> None:
    """Sampling that draws from one generator, in the order of the batch."""
    generator = torch.Generator().manual_seed(0)

    def choose(self: RequestSampler, row_V: Any) -> int:
        return int(torch.multinomial(torch.softmax(torch.from_numpy(row_V), -1), 1, generator=generator))

    patch.setattr(RequestSampler, "_choose", choose)


DEFECTS: list[Patch] = [
    product_by_rows,
    product_split_by_batch,
    attention_split_by_rows,
    unfused_norm,
    scalar_tail,
    noise_in_batch_order,
]


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.__name__)
def test_each_defect_is_found(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, defect: Patch) -> None:
    network: Any = network_of(tiny_dir)
    operators: Operators = network.operators
    defect(monkeypatch, operators)
    certificate = certify(network, "fp_x", {})
    assert not certificate.passed
    assert any(probe.detail for probe in certificate.probes)


def test_a_stale_cache_page_is_found(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefix cache that forgets to compare what lies in the page."""
    from gnomon.engine.pages import PagePool

    found = PagePool.find

    def find(self: PagePool, keys: Any, token_ids: Any) -> list[int]:
        pages = found(self, keys, token_ids)
        return [page ^ 1 for page in pages]

    monkeypatch.setattr(PagePool, "find", find)
    assert not certify(network_of(tiny_dir), "fp_x", {}).passed


def test_it_is_kept_between_runs_and_renewed_on_demand(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    network: Any = network_of(tiny_dir)
    first = certified(network, "fp_x", {})
    assert certified(network, "fp_x", {}) == first
    product_by_rows(monkeypatch, network.operators)
    assert certified(network, "fp_x", {}).passed  # kept
    assert not certified(network, "fp_x", {}, renew=True).passed
    kept = list((tmp_path / "certificates").iterdir())
    assert len(kept) == 1
    kept[0].write_text("{ damaged")
    assert not certified(network, "fp_x", {}).passed


def run_ten(engine: Engine) -> None:
    for number in range(10):
        record = Record()
        params = SamplingParams(temperature=0.9, seed=number, max_tokens=6)
        engine.submit(record.request(number, [5, 6, 7, 8] * 20, params))
    while engine.step():
        pass


def test_the_sentinel_repeats_requests_and_is_content(tiny_dir: Path) -> None:
    engine = Engine(PagedRunner(network_of(tiny_dir), page_count=16), sentinel_every=3)
    run_ten(engine)
    stats = engine.stats()
    assert (stats.sentinel_replays, stats.sentinel_mismatches) == (3, 0)
    assert (stats.running, stats.pages_used) == (0, 0)


def test_the_sentinel_rings_when_bits_follow_the_batch(
    tiny_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    network: Any = network_of(tiny_dir)
    product_by_rows(monkeypatch, network.operators)
    engine = Engine(PagedRunner(network, page_count=16), sentinel_every=9)
    run_ten(engine)
    assert engine.stats().sentinel_mismatches == 1
    assert "not deterministic" in caplog.text
