"""Model breadcrumbs (arXiv 2312.06795): drop each task vector's largest outliers, then its smallest elements."""

from __future__ import annotations

import math

from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.deltas import combine
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.select import Kept, greatest
from gnomon.merge.shares import check_density, check_share

Band = tuple[Kept, Kept]
"""Kept: among the first cut's elements, not among the second's (the outliers)."""


def check(density: list[float], gamma: list[float]) -> None:
    check_density(density)
    check_share("gamma", gamma)


def counts(density: float, gamma: float, count: int) -> tuple[int, int]:
    """(greatest to look at, outliers among them to drop)."""
    target = math.floor(density * count)
    outliers = min(math.floor(gamma * count), count - target)
    return target + outliers, outliers


def measure(view: TensorView, *, density: list[float], gamma: list[float]) -> list[Band]:
    """For each model, the band of magnitudes that stays."""
    pairs = [counts(share, top, view.numel) for share, top in zip(density, gamma, strict=True)]

    def scores(block: Block) -> list[Tensor]:
        return [magnitude for delta_RC in block.deltas() for magnitude in [delta_RC.abs().float()] * 2]

    cuts = greatest(view, scores, [keep for pair in pairs for keep in pair])
    return list(zip(cuts[::2], cuts[1::2], strict=True))


def trimmed(block: Block, bands: list[Band], density: list[float]) -> list[Tensor]:
    parts_RC = []
    for delta_RC, (inner, outliers), share in zip(block.deltas(), bands, density, strict=True):
        if share >= 1:
            parts_RC.append(delta_RC)
            continue
        magnitude_RC = delta_RC.abs().float()
        mask_RC = inner.mask(magnitude_RC, block.start) & ~outliers.mask(magnitude_RC, block.start)
        parts_RC.append(delta_RC * mask_RC)
    return parts_RC


@merge_method("breadcrumbs", measure=measure, check=check, sources=(0, None), scratch=10, reference="arXiv 2312.06795")
def breadcrumbs(
    block: Block,
    measured: list[Band],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    gamma: PerModel[float] = each(0.01),
    normalize: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop outliers and small elements of each task vector, then the weighted sum."""
    parts_RC = trimmed(block, measured, list(density))
    return combine(block, parts_RC, weight=weight, normalize=normalize, scale=lambda_, elect=False)


@merge_method(
    "breadcrumbs_ties", measure=measure, check=check, sources=(0, None), scratch=11, reference="arXiv 2312.06795"
)
def breadcrumbs_ties(
    block: Block,
    measured: list[Band],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    gamma: PerModel[float] = each(0.01),
    normalize: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Breadcrumbs' trim, then TIES' sign election."""
    parts_RC = trimmed(block, measured, list(density))
    return combine(block, parts_RC, weight=weight, normalize=normalize, scale=lambda_, elect=True)
