"""Memory for weights, in the processor's large pages where the system grants them on request.

A decoding step reads every weight once. With pages of 4 KB the processor's prefetchers stop at each page's end and most
reads begin with a walk through page tables; in pages of 2 MB the weights come as the streams they are. Where the system
has no such request this is ordinary memory.
"""

from __future__ import annotations

import mmap
from math import prod

import torch
from torch import Tensor

CHUNK = 64 << 20
LINE = 64
"""Bytes of a cache line: where a tensor begins."""


class LargePages:
    """Hands out tensors from chunks; a chunk's memory is given back when the last tensor on it is gone."""

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def moved(self, tensor: Tensor) -> Tensor:
        """A copy that lies here; the tensor itself when it is on another device or the system knows no large pages."""
        if tensor.device.type != "cpu" or not hasattr(mmap, "MADV_HUGEPAGE"):
            return tensor
        placed = self._empty(tensor.shape, tensor.dtype)
        placed.copy_(tensor)
        return placed

    def _empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        count = prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=dtype)
        size = count * dtype.itemsize
        if self._chunk is None or self._used + size > len(self._chunk):
            self._chunk = mmap.mmap(-1, max(CHUNK, size), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._chunk.madvise(mmap.MADV_HUGEPAGE)
            self._used = 0
        tensor = torch.frombuffer(self._chunk, dtype=dtype, count=count, offset=self._used).view(shape)
        self._used += -(-size // LINE) * LINE
        return tensor
