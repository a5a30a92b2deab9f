"""What a merge will read, write and need: bytes, peak memory, time. From headers alone."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from gnomon.merge.budget import Budget, parse_bytes
from gnomon.merge.randomness import CounterRandomness, TorchRandomness
from gnomon.merge.registry import methods
from gnomon.merge.shards import SHARD_BYTES, lay_out
from gnomon.merge.tensors import merge_view, view_of

if TYPE_CHECKING:
    from gnomon.merge.merged import MergedCheckpoint


READING, WRITING = 0.5e-9, 2.5e-9
"""Seconds a byte: from and to a solid-state disk, two sums of what is written included."""
SAMPLE = (1024, 1024)


@dataclass(frozen=True)
class Forecast:
    """peak_memory: bytes, the process included. seconds: an estimate, from merging a made-up tensor on this machine."""

    tensors: int
    bytes_read: int
    bytes_written: int
    files: int
    peak_memory: int
    worst_tensor: str
    threads: int
    seconds: float


def forecast(
    merged: MergedCheckpoint, *, max_memory: int | str | None = None, shard_bytes: int | str = SHARD_BYTES
) -> Forecast:
    """Raises MergeError when max_memory does not suffice."""
    limit = parse_bytes(max_memory, "max_memory") if max_memory is not None else None
    budget = Budget.of(merged, limit)
    shards, slots = lay_out(merged, parse_bytes(shard_bytes, "out_shard_size"), "0" * 64)
    read = work = elements = 0
    for planned in merged.plan.tensors:
        for source in planned.inputs:
            info = merged.models[source.model].info(source.tensor)
            count = torch.Size(info.shape).numel()
            read += int(count * _element_size(info.dtype))
            work += count * (methods()[planned.method].scratch if planned.method else 1)
        elements += torch.Size(planned.shape).numel()
    written = sum(slot.size for slot in slots)
    sampled = _seconds_per_element(merged, budget.threads)
    computing = elements * sampled if sampled is not None else work * _seconds_per_operation() / budget.threads
    seconds = computing + read * READING + written * WRITING
    return Forecast(
        len(slots), read, written, len(shards), budget.peak, budget.worst, budget.threads, round(seconds, 1)
    )


def _element_size(dtype: str) -> float:
    known = getattr(torch, dtype, None)
    return torch.empty(0, dtype=known).element_size() if isinstance(known, torch.dtype) else 0.6


def _seconds_per_element(merged: MergedCheckpoint, threads: int) -> float | None:
    """Time of the plan's method on one element of its output, measured; None where it looks at data."""
    largest = max(merged.plan.tensors, key=lambda planned: torch.Size(planned.shape).numel())
    found = methods()[largest.method] if largest.method else None
    if found is None or found.learned or found.statistics:
        return None
    generator = torch.Generator().manual_seed(0)
    kind = getattr(torch, largest.promoted)
    base = torch.randn(SAMPLE, generator=generator) * 0.02
    models = [(base + torch.randn(SAMPLE, generator=generator) * 1e-3).to(kind) for _ in largest.sources]
    random = TorchRandomness(0) if merged.plan.compat else CounterRandomness(0)
    times = []
    for _ in range(2):  # the first one warms threads and pages
        view = view_of(found, models, base.to(kind) if largest.base is not None else None, random)
        view.threads = threads
        before = time.perf_counter()
        merge_view(found, view, dict(largest.parameters), getattr(torch, largest.dtype))
        times.append(time.perf_counter() - before)
    return min(times) / (SAMPLE[0] * SAMPLE[1])


@cache
def _seconds_per_operation() -> float:
    """Time of one elementwise operation on one number, measured on a block."""
    x, y = torch.ones(1 << 18), torch.ones(1 << 18)
    before = time.perf_counter()
    for _ in range(8):
        x = torch.where(x > y, x * y, y)
    return (time.perf_counter() - before) / (8 * 3 * (1 << 18))
