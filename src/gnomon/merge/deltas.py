"""What the task-vector methods share: thinned task vectors, summed with or without an elected sign (TIES, 2306.01708).

A delta is model minus base. Native where it can be (csrc/merging.cpp), in torch with the same bits elsewhere.
Legend: R rows of a block, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gnomon.errors import MergeError
from gnomon.kernels import merging
from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.randomness import CounterRandomness
from gnomon.merge.select import Cut
from gnomon.merge.shares import l1_scale


@dataclass(frozen=True)
class Drawn:
    """Random drops of one model's elements. bits: of each block, by its index, where the native kernels drew them."""

    density: float
    bits: Sequence[Tensor] | None = None


@dataclass(frozen=True)
class Trim:
    """How one task vector is thinned: kept by `cut`, but not by `outliers`; dropped at random; times `scale`.

    mask: [R, C], of this block, instead of a draw.
    """

    cut: Cut | None = None
    outliers: Cut | None = None
    drawn: Drawn | None = None
    mask: Tensor | None = None
    scale: float | None = None

    def apply(self, block: Block, model: int) -> Tensor:
        """The thinned task vector, [R, C]."""
        delta_RC = block.deltas()[model]
        if self.cut is not None:
            magnitude_RC = delta_RC.abs().float()
            mask_RC = self.cut.mask(magnitude_RC, block.start)
            if self.outliers is not None:
                mask_RC &= ~self.outliers.mask(magnitude_RC, block.start)
            delta_RC = delta_RC * mask_RC
        if self.drawn is not None:
            delta_RC = delta_RC * keep(block, model, self.drawn.density)
        if self.mask is not None:
            delta_RC = delta_RC * self.mask
        return delta_RC if self.scale is None else delta_RC * self.scale


def rescaled(view: TensorView, trims: Sequence[Trim]) -> list[Trim]:
    """The same, each thinned task vector brought back to the L1 norm it had."""
    chosen = [model for model, trim in enumerate(trims) if trim.cut is not None]

    def norms(block: Block) -> list[Tensor]:
        before = [block.deltas()[model].abs() for model in chosen]
        return before + [trims[model].apply(block, model).abs() for model in chosen]

    sums = view.sums(norms) if chosen else []
    scales = {m: l1_scale(sums[i], sums[len(chosen) + i], view.dtype) for i, m in enumerate(chosen)}
    return [replace(trim, scale=scales[m]) if m in scales else trim for m, trim in enumerate(trims)]


def combine(
    block: Block, trims: Sequence[Trim], *, weight: Sequence[float], normalize: bool, scale: float, elect: bool
) -> Tensor:
    """base + scale * (weighted sum of thinned deltas). elect: keep only what agrees with the sign of the sum (0 is +).

    normalize: divide by the weights that took part (where they cancel, by 1).
    """
    shares = torch.tensor(list(weight), dtype=block.view.dtype)
    if not trims:
        return block.base
    if block.native and all(_is_native(trim) for trim in trims):
        return _combined(block, trims, shares, normalize, scale, elect)
    deltas_RC = [trim.apply(block, model) for model, trim in enumerate(trims)]
    weighted_RC = [delta_RC * share for delta_RC, share in zip(deltas_RC, shares, strict=True)]
    if elect:
        merged_RC, divisor = _elected(weighted_RC, shares, normalize)
    else:
        merged_RC, divisor = _sum(weighted_RC), shares.sum()
    if normalize:
        merged_RC = merged_RC / _nonzero(divisor)
    return block.base + merged_RC * scale if scale != 1.0 else block.base + merged_RC


def keep(block: Block, model: int, probability: float | Tensor) -> Tensor:
    """[R, C] bool: one model's draws for a block; probability: one, or one per element."""
    shape = block.shape
    random = block.view.random
    if not isinstance(random, CounterRandomness):
        raise MergeError("Block by block there are counter-based draws only.")
    return random.keep(block.view.name, model, block.start, probability, shape)


def _nonzero(divisor: Tensor) -> Tensor:
    return torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)


def _sum(parts_RC: Sequence[Tensor]) -> Tensor:
    summed = parts_RC[0].clone()
    for part_RC in parts_RC[1:]:
        summed += part_RC
    return summed


def _elected(weighted_RC: Sequence[Tensor], shares: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    positive = _sum(weighted_RC) >= 0
    kept_RC, shares_RC = [], []
    for part_RC, share in zip(weighted_RC, shares, strict=True):
        agrees = torch.where(positive, part_RC > 0, part_RC < 0)
        kept_RC.append(part_RC * agrees)
        if normalize:
            shares_RC.append(agrees.to(part_RC.dtype) * share)
    return _sum(kept_RC), _sum(shares_RC) if normalize else torch.ones((), dtype=weighted_RC[0].dtype)


def _is_native(trim: Trim) -> bool:
    return trim.mask is None and (trim.drawn is None or trim.drawn.bits is not None)


def _combined(
    block: Block, trims: Sequence[Trim], shares: Tensor, normalize: bool, scale: float, elect: bool
) -> Tensor:
    """All of it in one pass over the stored rows."""

    def within(cut: Cut | None) -> tuple[float, int] | None:
        return (cut.threshold, cut.last - block.start) if cut is not None else None

    parts = [
        merging.Part(
            raw,
            share,
            within(trim.cut),
            within(trim.outliers),
            trim.drawn.bits[block.index] if trim.drawn is not None and trim.drawn.bits is not None else None,
            trim.scale,
        )
        for raw, trim, share in zip(block.raw, trims, shares.tolist(), strict=True)
    ]
    divisor = float(_nonzero(shares.sum())) if normalize else None
    base, factor = block.raw_base, scale if scale != 1.0 else None
    if base is None:
        return block.base  # raises: there is none
    out = merging.combine(base, parts, elect=elect, divisor=divisor, scale=factor, out_dtype=block.view.out_dtype)
    return out.reshape(block.shape)
