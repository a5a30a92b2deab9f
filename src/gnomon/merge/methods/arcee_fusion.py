"""Arcee Fusion: take over only the other model's most important changes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method
from gnomon.merge.select import Scores, greatest

TINY = 1e-8


def importance(block: Block) -> Tensor:
    """[R, C] float32: |difference| * KL(softmax(model row) || softmax(base row))."""
    base_RC, model_RC = block.base.float(), block.models_RC[0].float()
    # between near models the divergence is at rounding's size: mergekit's own steps, or other elements would be taken
    share_RC, base_share_RC = model_RC.softmax(-1) + TINY, base_RC.softmax(-1) + TINY
    divergence_R1 = (share_RC * (share_RC / base_share_RC).log()).sum(-1, keepdim=True)
    return (model_RC - base_RC).abs() * divergence_R1


def quantile(view: TensorView, share: float) -> float:
    """Exact: the value at the lower of the two nearest ranks."""
    keep = view.numel - math.floor(share * (view.numel - 1))
    if keep == view.numel:
        return min(view.map(lambda block: float(importance(block).min())))
    return greatest(view, Scores(lambda block: [importance(block)]), [keep])[0].threshold


def measure(view: TensorView) -> float:
    """Median + 1.5 interquartile ranges."""
    if view.numel == 0:
        return 0.0
    first, median, third = (quantile(view, share) for share in (0.25, 0.5, 0.75))
    return median + 1.5 * (third - first)


@merge_method("arcee_fusion", sources=(1, 1), measure=measure, scratch=10)
def arcee_fusion(block: Block, measured: float) -> Tensor:
    """Base, with the other model's most important changes taken over."""
    keep_RC = importance(block) >= measured
    return torch.where(keep_RC, block.models_RC[0], block.base)
