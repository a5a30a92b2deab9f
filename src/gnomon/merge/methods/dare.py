"""DARE (arXiv 2311.03099): drop parameters of each task vector at random, rescale the rest.

rescale l1 (mergekit's `true`) keeps the L1 norm; inverse_density is the paper's 1 / density.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.deltas import combine
from gnomon.merge.randomness import TorchRandomness
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.shares import check_density, l1_scale

RESCALE = {"true": "l1", "l1": "l1", "inverse_density": "inverse_density", "false": "false"}


def check(density: list[float], rescale: str) -> None:
    check_density(density)
    if rescale not in RESCALE:
        raise UsageError(f"`rescale` must be l1 (true), inverse_density or false, not `{rescale}`.", param="rescale")


def draw(view: TensorView, *, density: list[float]) -> None:
    """Under compat: the masks of all models, in their order."""
    if isinstance(view.random, TorchRandomness):
        for model, share in enumerate(density):
            if 0 < share < 1:
                view.random.draw(view.name, model, torch.full(view.shape, share, dtype=torch.float32))


def kept(block: Block, model: int, density: float) -> Tensor:
    """A model's task vector with the dropped elements at zero."""
    delta_RC = block.deltas()[model]
    if density >= 1:
        return delta_RC
    if density <= 0:
        return torch.zeros_like(delta_RC)
    return delta_RC * block.view.random.keep(block.view.name, model, block.start, density, delta_RC.shape)


def measure(view: TensorView, *, density: list[float], rescale: str) -> list[float]:
    """For each model, the factor that makes up for what was dropped."""
    kind = RESCALE[rescale]
    if kind == "false":
        return [1.0] * len(density)
    if kind == "inverse_density":
        return [1 / share if share > 0 else 1.0 for share in density]

    def norms(block: Block) -> list[Tensor]:
        before = [delta_RC.abs() for delta_RC in block.deltas()]
        return before + [kept(block, model, share).abs() for model, share in enumerate(density)]

    sums = view.sums(norms)
    return [l1_scale(before, after, view.dtype) for before, after in zip(sums, sums[len(density) :], strict=False)]


def dropped(block: Block, scales: list[float], density: list[float]) -> list[Tensor]:
    return [
        kept(block, model, share) * scale if share < 1 else block.deltas()[model]
        for model, (share, scale) in enumerate(zip(density, scales, strict=True))
    ]


@merge_method(
    "dare_linear", measure=measure, draw=draw, check=check, sources=(0, None), scratch=9, reference="arXiv 2311.03099"
)
def dare_linear(
    block: Block,
    measured: list[float],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    normalize: bool = False,
    rescale: str = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop and rescale, then the weighted sum."""
    parts_RC = dropped(block, measured, list(density))
    return combine(block, parts_RC, weight=weight, normalize=normalize, scale=lambda_, elect=False)


@merge_method(
    "dare_ties", measure=measure, draw=draw, check=check, sources=(0, None), scratch=10, reference="arXiv 2311.03099"
)
def dare_ties(
    block: Block,
    measured: list[float],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    normalize: bool = False,
    int8_mask: bool = False,
    rescale: str = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop and rescale, then TIES' sign election."""
    parts_RC = dropped(block, measured, list(density))
    return combine(block, parts_RC, weight=weight, normalize=normalize, scale=lambda_, elect=True)
