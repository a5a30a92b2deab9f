"""TIES (arXiv 2306.01708): trim each task vector, elect a sign per parameter, merge what agrees.

trim_scope tensor is mergekit's (each tensor keeps its share), model the paper's (the whole task vector does).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from gnomon.errors import UsageError
from gnomon.merge.blocks import Block, ChainedView, TensorView
from gnomon.merge.deltas import Trim, combine, rescaled
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.select import Cut, Magnitudes, greatest
from gnomon.merge.shares import check_density


def trim_count(density: float, count: int) -> int:
    """How many elements a trim keeps: at least one of them unless the density is 0."""
    return 0 if density <= 0 else max(1, math.floor(density * count))


def check(density: list[float], trim_scope: str) -> None:
    check_density(density)
    if trim_scope not in ("tensor", "model"):
        raise UsageError(f"`trim_scope` is tensor or model, not `{trim_scope}`.", param="trim_scope")


def measure(view: TensorView, *, density: list[float], trim_scope: str, rescale: bool) -> Sequence[Trim]:
    """For each model, the trim that keeps its greatest magnitudes."""
    cuts = tensor_cuts(view, density, trim_scope)
    trims = [Trim(cut if share < 1 else None) for cut, share in zip(cuts, density, strict=True)]
    return rescaled(view, trims) if rescale else trims


def tensor_cuts(view: TensorView, density: list[float], trim_scope: str) -> Sequence[Cut]:
    if trim_scope == "model" and view.siblings is not None and view.once is not None:
        chain = ChainedView(view.siblings(), view.threads)
        cuts = view.once(f"ties {density}", lambda: model_cuts(chain, density))
        return [cut.shifted(chain.start_of(view.name)) for cut in cuts]
    keeps = [trim_count(share, view.numel) for share in density]
    return greatest(view, Magnitudes(), keeps)


def model_cuts(chain: ChainedView, density: list[float]) -> Sequence[Cut]:
    """The paper's trim: the greatest magnitudes of a model's whole task vector."""
    keeps = [trim_count(share, chain.numel) for share in density]
    return greatest(chain, Magnitudes(), keeps)


@merge_method("ties", measure=measure, check=check, sources=(0, None), scratch=9, reference="arXiv 2306.01708")
def ties(
    block: Block,
    measured: Sequence[Trim],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    normalize: bool = True,
    int8_mask: bool = False,
    rescale: bool = False,
    trim_scope: str = "tensor",
    lambda_: float = 1.0,
) -> Tensor:
    """Trim by magnitude, elect signs, average what agrees."""
    return combine(block, measured, weight=weight, normalize=normalize, scale=lambda_, elect=True)
