"""DELLA (arXiv 2406.11617): drop by chance, the more likely the smaller an element is within its row."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.deltas import Trim, combine, keep
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.shares import l1_scale


def check(density: list[float], epsilon: list[float]) -> None:
    for share, spread in zip(density, epsilon, strict=True):
        if share < 1 and not (share - spread > 0 and share + spread < 1):
            raise UsageError(
                f"della needs 0 < density - epsilon and density + epsilon < 1, not {share} -+ {spread}.",
                param="epsilon",
            )


def keep_probability(delta_RC: Tensor, density: float, epsilon: float) -> Tensor:
    """[R, C] float32: from density - epsilon for a row's smallest magnitude to density + epsilon for its greatest."""
    columns = delta_RC.shape[-1]
    rank_RC = delta_RC.abs().float().argsort(dim=-1, stable=True).argsort(dim=-1, stable=True).float()
    middle = density - epsilon
    return rank_RC * (2 * epsilon / max(1, columns - 1)) + middle if columns > 1 else torch.full_like(rank_RC, middle)


def mask(block: Block, model: int, density: float, epsilon: float) -> Tensor:
    """[R, C] bool: what the draw keeps."""
    return keep(block, model, keep_probability(block.deltas()[model], density, epsilon))


def kept(block: Block, model: int, density: float, epsilon: float) -> Tensor:
    delta_RC = block.deltas()[model]
    return delta_RC if density >= 1 else delta_RC * mask(block, model, density, epsilon)


def measure(view: TensorView, *, density: list[float], epsilon: list[float], rescale: bool) -> list[float]:
    """For each model, the factor that brings its L1 norm back."""
    if not rescale:
        return [1.0] * len(density)

    def norms(block: Block) -> list[Tensor]:
        before = [delta_RC.abs() for delta_RC in block.deltas()]
        shares = enumerate(zip(density, epsilon, strict=True))
        return before + [kept(block, model, share, spread).abs() for model, (share, spread) in shares]

    sums = view.sums(norms)
    return [l1_scale(before, after, view.dtype) for before, after in zip(sums, sums[len(density) :], strict=False)]


def dropped(block: Block, scales: list[float], density: list[float], epsilon: list[float]) -> list[Trim]:
    return [
        Trim(mask=mask(block, model, share, spread), scale=scale) if share < 1 else Trim()
        for model, (share, spread, scale) in enumerate(zip(density, epsilon, scales, strict=True))
    ]


@merge_method(
    "della", measure=measure, check=check, random=True, sources=(0, None), scratch=14, reference="arXiv 2406.11617"
)
def della(
    block: Block,
    measured: list[float],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    epsilon: PerModel[float] = each(0.15),
    normalize: bool = True,
    int8_mask: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop by magnitude rank, then TIES' sign election."""
    trims = dropped(block, measured, list(density), list(epsilon))
    return combine(block, trims, weight=weight, normalize=normalize, scale=lambda_, elect=True)


@merge_method(
    "della_linear",
    measure=measure,
    check=check,
    random=True,
    sources=(0, None),
    scratch=13,
    reference="arXiv 2406.11617",
)
def della_linear(
    block: Block,
    measured: list[float],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    epsilon: PerModel[float] = each(0.15),
    normalize: bool = False,
    rescale: bool = True,
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop by magnitude rank, then the weighted sum."""
    trims = dropped(block, measured, list(density), list(epsilon))
    return combine(block, trims, weight=weight, normalize=normalize, scale=lambda_, elect=False)
