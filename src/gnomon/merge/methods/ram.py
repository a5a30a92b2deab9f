"""RAM: what one model alone changed is kept whole, what several changed is averaged over them."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method


def changed(block: Block, epsilon: float) -> tuple[Tensor, Tensor]:
    """(masks_nRC: where each model differs from the base, count_RC: by how many)."""
    masks_nRC = torch.stack([delta_RC.abs() > epsilon for delta_RC in block.deltas()])
    return masks_nRC, masks_nRC.sum(0)


def average(block: Block, epsilon: float, scales: list[float]) -> Tensor:
    masks_nRC, count_RC = changed(block, epsilon)
    alone_RC = count_RC == 1
    parts_RC = []
    for delta_RC, mask_RC, scale in zip(block.deltas(), masks_nRC, scales, strict=True):
        part_RC = delta_RC * mask_RC
        parts_RC.append(torch.where(alone_RC, part_RC * scale, part_RC) if scale != 1.0 else part_RC)
    return block.base + torch.stack(parts_RC).sum(0) / count_RC.clamp_min(1)


@merge_method("ram", scratch=8)
def ram(block: Block, measured: None, *, epsilon: float = 1e-5) -> Tensor:
    """Keep what one model changed, average what several changed."""
    return average(block, epsilon, [1.0] * len(block.models_RC))


def measure(view: TensorView, *, epsilon: float, r: float, alpha: float) -> list[float]:
    """For each model, how much its own changes are amplified: 1 + r * clip(shared / unique, 0, alpha)."""

    def count(block: Block) -> list[Tensor]:
        masks_nRC, count_RC = changed(block, epsilon)
        unique = [mask_RC & (count_RC == 1) for mask_RC in masks_nRC]
        shared = [mask_RC & (count_RC > 1) for mask_RC in masks_nRC]
        return [mask.float() for mask in (*unique, *shared)]

    sums = view.sums(count)
    models = len(view.readers)
    pairs = zip(sums[:models], sums[models:], strict=True)
    return [1 + r * min(max(shared / unique if unique else 0.0, 0.0), alpha) for unique, shared in pairs]


@merge_method("ramplus_tl", measure=measure, scratch=8)
def ramplus_tl(
    block: Block, measured: list[float], *, epsilon: float = 1e-5, r: float = 0.1, alpha: float = 0.2
) -> Tensor:
    """RAM with each model's own changes amplified by how much it shares."""
    return average(block, epsilon, measured)
