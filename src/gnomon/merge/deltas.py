"""What the task-vector methods share: the parameters' sum with or without an elected sign (TIES, arXiv 2306.01708).

A delta is model minus base. Legend: R rows of a block, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.merge.blocks import Block


def combine(
    block: Block, deltas_RC: Sequence[Tensor], *, weight: Sequence[float], normalize: bool, scale: float, elect: bool
) -> Tensor:
    """base + scale * (weighted sum of deltas). elect: keep only what agrees with the sign of the sum (0 counts as +).

    normalize: divide by the weights that took part (where they cancel, by 1).
    """
    base_RC = block.base
    # a weight is rounded to the tensors' type first: under compat that is what mergekit multiplies by
    shares = torch.tensor(list(weight), dtype=base_RC.dtype)
    weighted_RC = [delta_RC * share for delta_RC, share in zip(deltas_RC, shares, strict=True)]
    if not weighted_RC:
        return base_RC
    if elect:
        merged_RC, divisor = _elected(weighted_RC, shares, normalize)
    else:
        merged_RC, divisor = _sum(weighted_RC), shares.sum()
    if normalize:
        divisor = torch.where(divisor.abs() < 1e-8, torch.ones_like(divisor), divisor)
        merged_RC = merged_RC / divisor
    return base_RC + merged_RC * scale if scale != 1.0 else base_RC + merged_RC


def _sum(parts_RC: Sequence[Tensor]) -> Tensor:
    if parts_RC[0].dtype in (torch.float32, torch.float64):
        summed = parts_RC[0].clone()
        for part_RC in parts_RC[1:]:
            summed += part_RC
        return summed
    return torch.stack(list(parts_RC)).sum(0)  # half types: accumulated in float32, rounded once


def _elected(weighted_RC: Sequence[Tensor], shares: Tensor, normalize: bool) -> tuple[Tensor, Tensor]:
    positive = _sum(weighted_RC) >= 0
    kept_RC, shares_RC = [], []
    for part_RC, share in zip(weighted_RC, shares, strict=True):
        agrees = torch.where(positive, part_RC > 0, part_RC < 0)
        kept_RC.append(part_RC * agrees)
        if normalize:
            shares_RC.append(agrees.to(part_RC.dtype) * share)
    return _sum(kept_RC), _sum(shares_RC) if normalize else torch.ones((), dtype=weighted_RC[0].dtype)
