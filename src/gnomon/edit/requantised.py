"""Requantised: whether an edit survives when its weights are written as quantised blocks (Q8_0 ... Q4_0).

An edit can be smaller than one step of a four-bit block and vanish. In goes a patch; out comes what is left of it once
W + delta is rounded to blocks and read back, as a dense patch that can be tried and evaluated like any other. Knows the
rounding of GGUF's simple blocks (by the `gguf` package), not its files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.models.patch import Dense, Patch
from gnomon.registry import nearest

if TYPE_CHECKING:
    from gnomon.models.checkpoint import Checkpoint

KINDS = ("Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
BLOCK = 32


@dataclass(frozen=True)
class Requantised:
    """patch: what the rounded weights differ by from the unrounded, unedited ones. kept: by tensor, the share of the
    edit that is still there, along the edit's own direction (1: all of it).
    """

    patch: Patch
    kept: dict[str, float]


def requantise(patch: Patch, checkpoint: Checkpoint, kind: str) -> Requantised:
    """Raises UsageError for a kind of block that cannot be written, or rows that do not fill blocks."""
    if kind.upper() not in KINDS:
        raise UsageError(
            f"`{kind}` blocks cannot be written here.", hint=nearest(kind.upper(), KINDS), param="requantise"
        )
    deltas, kept = {}, {}
    for name in patch.deltas:
        weight, change = checkpoint[name].float(), patch.dense(name)
        plain, edited = rounded(weight, kind, name), rounded(weight + change, kind, name)
        deltas[name] = Dense((edited - weight).contiguous())
        left, whole = (edited - plain).double(), change.double()
        kept[name] = float((left * whole).sum() / (whole * whole).sum().clamp_min(1e-300))
    metadata: dict[str, Any] = {**patch.metadata, "requantised": kind.upper()}
    return Requantised(Patch(deltas, patch.base, metadata, dict(patch.report)), kept)


def rounded(weight: Tensor, kind: str, name: str) -> Tensor:
    """The weight as blocks of this kind would give it back, float32."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    if weight.dim() != 2 or weight.shape[1] % BLOCK:
        raise UsageError(
            f"`{name}` has rows that do not fill blocks of {BLOCK}: {list(weight.shape)}.", param="requantise"
        )
    chosen = GGMLQuantizationType[kind.upper()]
    back: Tensor = torch.from_numpy(dequantize(quantize(weight.contiguous().numpy(), chosen), chosen).copy())
    return back.reshape(weight.shape)
