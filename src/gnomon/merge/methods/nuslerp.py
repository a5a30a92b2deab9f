"""Spherical interpolation by weights, of whole tensors, rows or columns; with a base, of task vectors."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, merge_method
from gnomon.merge.sphere import gram, slerp_coefficients

TINY = 1e-8
NEARLY_PARALLEL = 1 - 1e-6


def share(weight: list[float]) -> float:
    """The second model's part; half where the weights cancel."""
    total = sum(weight)
    return 0.5 if abs(total) < 1e-6 else weight[1] / total


def measure(
    view: TensorView, *, weight: list[float], nuslerp_flatten: bool, nuslerp_row_wise: bool
) -> tuple[Tensor, Tensor] | None:
    """Coefficients: scalars for the whole tensor, one per column, None where each row finds its own.

    nuslerp_row_wise: vectors run along the first dimension (one per column), as in mergekit; else along the last.
    """
    if nuslerp_flatten or len(view.shape) < 2:
        products = gram(view, "models" if view.base_reader is None else "deltas")
        first, second, dot = products[0, 0], products[1, 1], products[0, 1]
    elif not nuslerp_row_wise:
        return None
    else:
        first, second, dot = view.column_sums(lambda block: _products(*block.vectors()))
    return _coefficients(first, second, dot, share(weight))


def _products(a_RC: Tensor, b_RC: Tensor) -> list[Tensor]:
    return [a_RC * a_RC, b_RC * b_RC, a_RC * b_RC]


def _coefficients(first: Tensor, second: Tensor, dot: Tensor, t: float) -> tuple[Tensor, Tensor]:
    norms = first.sqrt().clamp_min(TINY) * second.sqrt().clamp_min(TINY)
    return slerp_coefficients(dot / norms, t, NEARLY_PARALLEL)


@merge_method("nuslerp", base="optional", sources=(2, 2), measure=measure)
def nuslerp(
    block: Block,
    measured: tuple[Tensor, Tensor] | None,
    *,
    weight: PerModel[float],
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
) -> Tensor:
    """Slerp between two models (or, with a base, two task vectors) by weight."""
    a_RC, b_RC = block.vectors()
    if measured is None:
        sums = [product.sum(-1, keepdim=True, dtype=torch.float64) for product in _products(a_RC, b_RC)]
        measured = _coefficients(sums[0], sums[1], sums[2], share(list(weight)))
    first, second = (block.per_column(c) if c.dim() == 1 else c.to(a_RC.dtype) for c in measured)
    merged_RC = a_RC * first + b_RC * second
    return merged_RC if block.base_RC is None else block.base_RC + merged_RC
