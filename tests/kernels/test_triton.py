"""The GPU kernels, run on the CPU by Triton's interpreter: right, and the same for a row in any company."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed (extra `cuda`)")

from gnomon.arch.network import build_network
from gnomon.errors import UsageError
from gnomon.kernels import triton_operators
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.torch_operators import TorchOperators
from gnomon.kernels.triton_operators import TritonOperators
from gnomon.loading import load
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

PAGES = [2, 0, 3]


@pytest.fixture(autouse=True)
def _one_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["fp32", "bf16"])
def ours(request: pytest.FixtureRequest) -> TritonOperators:
    return TritonOperators(request.param, "cpu")


REFERENCE = TorchOperators("fp32", 1)


def held(ours: TritonOperators, tensor: Tensor) -> Tensor:
    """What the profile makes of a product's operand."""
    return tensor.bfloat16().float() if ours.dtype == "bf16" else tensor


def test_a_product_is_torchs_and_its_rows_do_not_know_each_other(ours: TritonOperators) -> None:
    x, weight, bias = torch.randn(70, 96), torch.randn(130, 96) / 96**0.5, torch.randn(130)
    whole = ours.linear(x, ours.linear_weight(weight), bias)
    expected = REFERENCE.linear(held(ours, x), REFERENCE.linear_weight(held(ours, weight)), bias)
    assert (whole - expected).abs().max() < 1e-5
    for start, end in ((0, 1), (3, 5), (1, 70)):
        assert torch.equal(ours.linear(x[start:end].clone(), ours.linear_weight(weight), bias), whole[start:end])
    loud = x.clone()
    loud[1::2] *= 1e4
    assert torch.equal(ours.linear(loud, ours.linear_weight(weight), bias)[::2], whole[::2])


def test_the_number_of_programs_changes_no_bit(ours: TritonOperators) -> None:
    x, weight = torch.randn(70, 96), ours.linear_weight(torch.randn(300, 96))
    alone = ours.linear(x, weight)
    ours.programs = 3
    assert torch.equal(ours.linear(x, weight), alone)


def test_another_tile_would_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutation check: this is why nothing is autotuned, and why the tiles stand in the profile."""
    ours = TritonOperators("fp32", "cpu")
    x, weight = torch.randn(70, 96), ours.linear_weight(torch.randn(130, 96))
    before, described = ours.linear(x, weight), ours.description()
    monkeypatch.setitem(triton_operators.TILES, "fp32", (64, 64, 16))
    assert not torch.equal(ours.linear(x, weight), before) and ours.description() != described


def test_norm_and_log_softmax_are_torchs_row_by_row(ours: TritonOperators) -> None:
    x, weight = torch.randn(9, 96), torch.rand(96)
    normed = ours.rms_norm(x, weight, 1e-6)
    assert (normed - REFERENCE.rms_norm(x, weight, 1e-6)).abs().max() < 1e-5
    assert torch.equal(ours.rms_norm(x[4:5], weight, 1e-6), normed[4:5])
    both, total = ours.add_rms_norm(x, x * 3, weight, 1e-6)
    assert torch.equal(total, x + x * 3) and torch.equal(both, ours.rms_norm(total, weight, 1e-6))
    logits = torch.randn(4, 2500) * 3
    logprobs = ours.log_softmax(logits)
    assert (logprobs - torch.log_softmax(logits, -1)).abs().max() < 1e-5
    assert torch.equal(ours.log_softmax(logits[2:3]), logprobs[2:3])


def test_activations_and_rotary_are_torchs(ours: TritonOperators) -> None:
    x, cos, sin = torch.randn(5, 4, 16), torch.randn(5, 6), torch.randn(5, 6)
    assert torch.equal(ours.rotary(x, cos, sin), REFERENCE.rotary(x, cos, sin))
    for name in ("silu_mul", "gelu_mul"):
        both = torch.randn(5, 32)
        assert torch.equal(getattr(ours, name)(both), getattr(REFERENCE, name)(both))


def attend(operators: Any, pieces: list[int], **options: Any) -> Tensor:
    """Attention of one 150-token text in pieces, over pages that hold rubbish where nothing was written."""
    total, size = 150, 24
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(total, 6, size, generator=generator)
    key, value = (torch.randn(total, 2, size, generator=generator) for _ in range(2))
    keys, values = torch.full((4, 2, PAGE, size), torch.nan), torch.full((4, 2, PAGE, size), torch.nan)
    out, start = [], 0
    for count in pieces:
        other = Span(1, [0] * 3, 0, [1])  # a neighbour in the batch
        batch = RaggedBatch.build([other, Span(0, [0] * count, start, PAGES)])
        part = slice(start, start + count)
        pad = torch.ones(3, 2, size)
        operators.write_pages(torch.cat([pad, key[part]]), torch.cat([pad, value[part]]), keys, values, batch)
        rows = torch.cat([torch.ones(3, 6, size), query[part]])
        out.append(operators.attention(rows, keys, values, batch, scale=0.3, **options)[3:])
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("options", [{}, {"window": 70}, {"softcap": 5.0}], ids=["plain", "window", "softcap"])
def test_attention_is_the_reference_in_whatever_pieces(options: dict[str, Any]) -> None:
    ours = TritonOperators("fp32", "cpu")
    whole = attend(ours, [150], **options)
    assert (whole - attend(REFERENCE, [150], **options)).abs().max() < 1e-5
    for pieces in ([PAGE, PAGE, 22], [63, 2, 85], [17, 130, 1, 1, 1]):
        assert torch.equal(attend(ours, pieces, **options), whole), pieces


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_whole_network_runs_on_them_whole_or_in_pieces(family: str, tmp_path: Path) -> None:
    small = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}
    kinds = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / family, family, **small, **kinds))
    network, reference = (build_network(checkpoint, ops) for ops in (TritonOperators("fp32", "cpu"), REFERENCE))
    ids = [(7 + 13 * i) % 300 for i in range(70)]

    def logits(net: Any, pieces: list[int]) -> Tensor:
        pages, out, start = net.new_pages(2), [], 0
        for count in pieces:
            batch = RaggedBatch.build([Span(0, ids[start : start + count], start, [1, 0], "all")])
            out.append(net.logits(net.forward(batch, pages)))
            start += count
        return torch.cat(out)

    whole = logits(network, [70])
    assert torch.allclose(whole, logits(reference, [70]), rtol=1e-4, atol=1e-3)
    assert torch.equal(logits(network, [33, 35, 1, 1]), whole)


def test_what_a_gpu_does_not_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    with pytest.raises(UsageError, match="`int8` has no GPU kernels"):
        load(folder, device="cuda", profile="int8")
    with pytest.raises(UsageError, match="no kernels for device `tpu`"):
        load(folder, device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="sees no CUDA device"):
            load(folder, device="cuda")
