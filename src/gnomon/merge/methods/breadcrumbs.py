"""Model breadcrumbs (arXiv 2312.06795): drop each task vector's largest outliers, then its smallest elements."""

from __future__ import annotations

import math

from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.deltas import Trim, combine, rescaled
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.select import Magnitudes, greatest
from gnomon.merge.shares import check_density, check_share


def check(density: list[float], gamma: list[float]) -> None:
    check_density(density)
    check_share("gamma", gamma)


def counts(density: float, gamma: float, count: int) -> tuple[int, int]:
    """(greatest to look at, outliers among them to drop)."""
    target = math.floor(density * count)
    outliers = min(math.floor(gamma * count), count - target)
    return target + outliers, outliers


def measure(view: TensorView, *, density: list[float], gamma: list[float], rescale: bool) -> list[Trim]:
    """For each model, the band of magnitudes that stays: the greatest, without the outliers among them."""
    pairs = [counts(share, top, view.numel) for share, top in zip(density, gamma, strict=True)]
    cuts = greatest(view, Magnitudes(times=2), [keep for pair in pairs for keep in pair])
    bands = zip(cuts[::2], cuts[1::2], density, strict=True)
    trims = [Trim() if share >= 1 else Trim(inner, outliers) for inner, outliers, share in bands]
    return rescaled(view, trims) if rescale else trims


@merge_method("breadcrumbs", measure=measure, check=check, sources=(0, None), scratch=10, reference="arXiv 2312.06795")
def breadcrumbs(
    block: Block,
    measured: list[Trim],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    gamma: PerModel[float] = each(0.01),
    normalize: bool = False,
    rescale: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Drop outliers and small elements of each task vector, then the weighted sum."""
    return combine(block, measured, weight=weight, normalize=normalize, scale=lambda_, elect=False)


@merge_method(
    "breadcrumbs_ties", measure=measure, check=check, sources=(0, None), scratch=11, reference="arXiv 2312.06795"
)
def breadcrumbs_ties(
    block: Block,
    measured: list[Trim],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    gamma: PerModel[float] = each(0.01),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Breadcrumbs' trim, then TIES' sign election."""
    return combine(block, measured, weight=weight, normalize=normalize, scale=lambda_, elect=True)
