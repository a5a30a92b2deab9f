"""SCE (arXiv 2408.07990): select the positions that vary most, weight models by energy, erase minority signs."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method
from gnomon.merge.select import EVERYTHING, Cut, Scores, greatest
from gnomon.merge.shares import check_share

SMALLEST_ENERGY = 1e-6
"""Summed mean squares below which all models weigh the same: mergekit's bound."""


@dataclass(frozen=True)
class Measured:
    """Which positions are kept, and each model's share."""

    cut: Cut
    weight: list[float]


def check(select_topk: float) -> None:
    check_share("select_topk", [select_topk])


def variance(block: Block) -> Tensor:
    """[R, C] float32: the task vectors' variance at each position."""
    return torch.stack(block.deltas()).float().var(0, correction=0)


def selected(block: Block, cut: Cut) -> list[Tensor]:
    deltas_RC = block.deltas()
    if cut is EVERYTHING:
        return deltas_RC
    mask_RC = cut.mask(variance(block), block.start)
    return [delta_RC * mask_RC for delta_RC in deltas_RC]


def measure(view: TensorView, *, select_topk: float) -> Measured:
    cut: Cut = EVERYTHING
    if select_topk < 1:
        varying = sum(view.map(lambda block: int(torch.count_nonzero(variance(block)))))
        cut = greatest(view, Scores(lambda block: [variance(block)]), [math.floor(select_topk * varying)])[0]
    sums = view.sums(lambda block: [delta_RC.square() for delta_RC in selected(block, cut)])
    energy = math.fsum(sums)
    alive = energy >= SMALLEST_ENERGY * view.numel
    return Measured(cut, [value / energy for value in sums] if alive else [1 / len(sums)] * len(sums))


@merge_method("sce", measure=measure, check=check, scratch=9, reference="arXiv 2408.07990")
def sce(block: Block, measured: Measured, *, int8_mask: bool = False, select_topk: float = 1.0) -> Tensor:
    """Select by variance, calculate weights by energy, erase minority signs."""
    deltas_RC = selected(block, measured.cut)
    total_RC = torch.stack(deltas_RC).sum(0)
    positive = total_RC >= 0
    parts_RC, shares_RC = [], []
    for delta_RC, share in zip(deltas_RC, torch.tensor(measured.weight, dtype=total_RC.dtype), strict=True):
        agrees_RC = torch.where(positive, delta_RC > 0, delta_RC < 0).to(delta_RC.dtype)
        parts_RC.append(delta_RC * agrees_RC * share)
        shares_RC.append(agrees_RC * share)
    merged_RC, divisor_RC = torch.stack(parts_RC).sum(0), torch.stack(shares_RC).sum(0)
    divisor_RC = torch.where(divisor_RC == 0, torch.ones_like(divisor_RC), divisor_RC)
    return block.base + merged_RC / divisor_RC
