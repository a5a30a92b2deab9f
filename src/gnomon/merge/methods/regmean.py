"""RegMean (arXiv 2212.09849): the linear layer whose outputs are nearest to all models' on their own inputs.

Needs `data:` (a text). W = (sum G_i)^-1 sum G_i W_i, G_i the inputs' Gram matrix with its off-diagonals scaled by
alpha; solved in float64 with a small ridge, as the difference from the average, so that directions that the text never
showed are averaged too. Everything without a Gram matrix is averaged. Legend: O outputs, I inputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.shares import check_share
from gnomon.merge.spectral import rows_of, weighted_sum

RIDGE = 1e-6


def check(alpha: float) -> None:
    check_share("alpha", [alpha])


def measure(view: TensorView, *, weight: list[float], alpha: float) -> Tensor | None:
    """The merged weight [O, I]; None for what is averaged."""
    if not view.statistics:
        return None
    parts = view.map(lambda block: [model_RC.double() for model_RC in block.models_RC])
    models_OI = [torch.cat(rows) for rows in zip(*parts, strict=True)]
    return solve(models_OI, view.statistics, weight, alpha)


def solve(models_OI: list[Tensor], grams: Sequence[Tensor], weight: list[float], alpha: float) -> Tensor:
    """[O, I] float64: nearest to all models' outputs on inputs with these Gram matrices."""
    outputs, inputs = models_OI[0].shape
    left = torch.zeros(inputs, inputs, dtype=torch.float64)
    right = torch.zeros(inputs, outputs, dtype=torch.float64)
    mean_OI = weighted_sum(models_OI, [share / sum(weight) for share in weight])
    for statistic, model_OI, share in zip(grams, models_OI, weight, strict=True):
        gram_II = statistic.double() * share
        gram_II = gram_II * alpha + torch.diag(gram_II.diagonal() * (1 - alpha))
        left += gram_II
        right += gram_II @ (model_OI - mean_OI).T
    left += torch.eye(len(left), dtype=torch.float64) * (RIDGE * left.diagonal().mean() + 1e-30)
    solved: Tensor = torch.linalg.solve(left, right)
    return mean_OI + solved.T


@merge_method(
    "regmean", base="ignored", measure=measure, check=check, whole=True, statistics="gram", reference="arXiv 2212.09849"
)
def regmean(
    block: Block, measured: Tensor | None, *, weight: PerModel[float] = each(1.0), alpha: float = 0.9
) -> Tensor:
    """Least squares on the layers' own inputs; what is no linear layer is averaged."""
    if measured is None:
        return weighted_sum(block.models_RC, [share / sum(weight) for share in weight])
    return rows_of(measured, block)
