"""How much memory a merge needs: planned before it runs, and kept by choosing how many blocks are in flight."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gnomon.errors import MergeError, UsageError
from gnomon.merge.blocks import BLOCK_ELEMENTS
from gnomon.merge.registry import methods
from gnomon.models.checkpoint import Checkpoint

if TYPE_CHECKING:
    from gnomon.merge.merged import MergedCheckpoint
    from gnomon.merge.planned import TensorPlan

PROCESS_BYTES = 520_000_000
"""Interpreter, torch and what else lies in memory before any tensor (measured: 310 to 510 MB)."""
UNITS = {"": 1, "b": 1, "k": 10**3, "kb": 10**3, "m": 10**6, "mb": 10**6, "g": 10**9, "gb": 10**9, "t": 10**12,
         "kib": 2**10, "mib": 2**20, "gib": 2**30, "tb": 10**12}  # fmt: skip


def parse_bytes(value: int | str, name: str) -> int:
    """ "2GB", "500M", "1GiB" or a number of bytes; for a shard size, mergekit's "5B" is 5 * 10**9."""
    if isinstance(value, int):
        return value
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", value)
    unit = match[2].lower() if match else "?"
    if match is None or unit not in UNITS:
        raise UsageError(f"--{name.replace('_', '-')}: `{value}` is no size.", hint="Write 2GB, 500MB.", param=name)
    factor = 10**9 if unit == "b" and name == "out_shard_size" else UNITS[unit]
    if (size := int(float(match[1]) * factor)) < 1:
        raise UsageError(f"--{name.replace('_', '-')} must be more than {value}.", param=name)
    return size


@dataclass(frozen=True)
class Budget:
    """threads: blocks in flight. peak: bytes at the worst tensor, the process included. worst: that tensor."""

    threads: int
    peak: int
    worst: str

    @classmethod
    def of(cls, merged: MergedCheckpoint, limit: int | None) -> Budget:
        """The most threads that fit. Raises MergeError naming the bytes needed when even one does not."""
        for threads in range(max(1, merged.threads), 0, -1):
            need, worst = max((tensor_bytes(merged, t, threads), t.name) for t in merged.plan.tensors)
            best = cls(threads, PROCESS_BYTES + need, worst)
            if limit is None or best.peak <= limit:
                return best
        need, worst = max((tensor_bytes(merged, t, 1), t.name) for t in merged.plan.tensors)
        peak, given = (PROCESS_BYTES + need) / 1e6, (limit or 0) / 1e6
        raise MergeError(
            f"This merge needs {peak:.0f} MB (tensor `{worst}`), more than the {given:.0f} MB of --max-memory.",
            hint=f"Allow at least {math.ceil(peak)}MB.",
            param="max_memory",
        )


def tensor_bytes(merged: MergedCheckpoint, tensor: TensorPlan, threads: int) -> int:
    """Working memory of one tensor beside the process itself."""
    if tensor.method is None:
        return sum(_held(merged, source.model, tensor) for source in tensor.inputs)
    method = methods()[tensor.method]
    elements = 1
    for extent in tensor.shape:
        elements *= extent
    models = len(tensor.inputs)
    block = min(elements, max(BLOCK_ELEMENTS, tensor.shape[-1] if tensor.shape else 1))
    working = block * 4 * models * (2 + method.scratch) * threads
    selected = elements // 8 * models if method.scratch >= 9 else 0  # samples and brackets of the k-th values
    whole = elements * 4 * (models + 3) if method.whole or merged.plan.compat else 0
    held = sum(elements * 4 for source in tensor.inputs if not _streams(merged.models[source.model], tensor))
    return working + selected + whole + held


def _held(merged: MergedCheckpoint, model: str, tensor: TensorPlan) -> int:
    elements = 1
    for extent in tensor.shape:
        elements *= extent
    return elements * 8


def _streams(checkpoint: Checkpoint, tensor: TensorPlan) -> bool:
    """Whether a checkpoint gives a tensor in parts without making all of it."""
    return type(checkpoint).reader is not Checkpoint.reader and not tensor.table
