"""Memory for weights: what is moved there stays what it was, on its own cache lines, for as long as it is used."""

from __future__ import annotations

import gc
import mmap

import pytest
import torch

from gnomon.kernels import large_pages
from gnomon.kernels.large_pages import LINE, LargePages


def test_a_moved_tensor_has_the_same_values_on_a_cache_line_of_its_own() -> None:
    memory = LargePages()
    tensors = [
        torch.randn(3, 5),
        torch.randn(7).to(torch.bfloat16),
        torch.arange(9, dtype=torch.uint8),
        torch.empty(0, 4),
    ]
    moved = [memory.moved(tensor) for tensor in tensors]
    for tensor, placed in zip(tensors, moved, strict=True):
        assert torch.equal(tensor, placed) and tensor.dtype == placed.dtype
        assert placed.data_ptr() != tensor.data_ptr() or not placed.numel()
        assert placed.data_ptr() % LINE == 0 or not placed.numel()
    moved[0].zero_()
    assert all(torch.equal(a, b) for a, b in zip(tensors[1:], moved[1:], strict=True))


def test_tensors_outlive_the_chunk_they_were_cut_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_pages, "CHUNK", 1 << 16)
    memory = LargePages()
    tensors = [memory.moved(torch.full((5000,), float(i))) for i in range(8)]  # 20 KB each: several chunks
    big = memory.moved(torch.ones(1 << 16))  # larger than a chunk
    del memory
    gc.collect()
    assert [float(t.mean()) for t in tensors] == [float(i) for i in range(8)]
    assert float(big.sum()) == 1 << 16


def test_where_the_system_knows_no_large_pages_nothing_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    tensor = torch.ones(3)
    assert LargePages().moved(tensor) is tensor
