"""DARE (arXiv 2311.03099): drop parameters of each task vector at random, rescale the rest.

rescale l1 (mergekit's `true`) keeps the L1 norm; inverse_density is the paper's 1 / density.
"""

from __future__ import annotations

import math

from torch import Tensor

from gnomon.errors import UsageError
from gnomon.kernels import merging
from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.deltas import Drawn, Trim, combine
from gnomon.merge.randomness import CounterRandomness
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.select import NOTHING
from gnomon.merge.shares import check_density, l1_scale

RESCALE = {"true": "l1", "l1": "l1", "inverse_density": "inverse_density", "false": "false"}


def check(density: list[float], rescale: str) -> None:
    check_density(density)
    if rescale not in RESCALE:
        raise UsageError(f"`rescale` must be l1 (true), inverse_density or false, not `{rescale}`.", param="rescale")


def measure(view: TensorView, *, density: list[float], rescale: str) -> list[Trim]:
    """For each model, what is drawn, and the factor that makes up for what was dropped."""
    kind = RESCALE[rescale]
    models = [model for model, share in enumerate(density) if 0 < share < 1]
    random = view.random
    if isinstance(random, CounterRandomness) and view.block_count() and view.block(0).native:
        # drawn once and kept as bits: a draw costs more than anything else here
        rows = view.map(lambda block: _draw_native(block, random, models, density))
        bits = {model: [row[place][0] for row in rows] for place, model in enumerate(models)}
        sums = [[math.fsum(row[place][1][side] for row in rows) for place in range(len(models))] for side in (0, 1)]
    else:
        bits, sums = {}, _norms(view, models, density) if kind == "l1" else [[], []]
    trims = []
    for share, place in zip(density, _places(density), strict=True):
        if place is None:
            trims.append(Trim() if share >= 1 else Trim(cut=NOTHING, scale=1.0))
            continue
        scale = 1.0
        if kind == "inverse_density":
            scale = 1 / share
        elif kind == "l1":
            scale = l1_scale(sums[0][place], sums[1][place], view.dtype)
        trims.append(Trim(drawn=Drawn(share, bits.get(models[place])), scale=scale))
    return trims


def _places(density: list[float]) -> list[int | None]:
    """For each model, its place among those that are drawn."""
    drawn = [0 < share < 1 for share in density]
    return [sum(drawn[:model]) if drawn[model] else None for model in range(len(density))]


def _draw_native(
    block: Block, random: CounterRandomness, models: list[int], density: list[float]
) -> list[tuple[Tensor, tuple[float, float]]]:
    """For each drawn model, (bits, (sum of magnitudes before, after))."""
    found = []
    for model in models:
        key, below = random.key(block.view.name, model), random.below(density[model])
        base = block.raw_base if block.raw_base is not None else block.base
        bits, sums = merging.drop(base, block.raw[model], key, block.start, below)
        before, after = sums.unbind(1)
        found.append((bits, (math.fsum(before.tolist()), math.fsum(after.tolist()))))
    return found


def _norms(view: TensorView, models: list[int], density: list[float]) -> list[list[float]]:
    def norms(block: Block) -> list[Tensor]:
        before = [block.deltas()[model].abs() for model in models]
        after = [Trim(drawn=Drawn(density[model])).apply(block, model).abs() for model in models]
        return before + after

    sums = view.sums(norms) if models else []
    return [sums[: len(models)], sums[len(models) :]]


@merge_method(
    "dare_linear", measure=measure, check=check, random=True, sources=(0, None), scratch=9, reference="arXiv 2311.03099"
)
def dare_linear(
    block: Block,
    measured: list[Trim],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    normalize: bool = False,
    rescale: str = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop and rescale, then the weighted sum."""
    return combine(block, measured, weight=weight, normalize=normalize, scale=lambda_, elect=False)


@merge_method(
    "dare_ties", measure=measure, check=check, random=True, sources=(0, None), scratch=10, reference="arXiv 2311.03099"
)
def dare_ties(
    block: Block,
    measured: list[Trim],
    *,
    weight: PerModel[float],
    density: PerModel[float] = each(1.0),
    normalize: bool = False,
    int8_mask: bool = False,
    rescale: str = "l1",
    lambda_: float = 1.0,
) -> Tensor:
    """Random drop and rescale, then TIES' sign election."""
    return combine(block, measured, weight=weight, normalize=normalize, scale=lambda_, elect=True)
