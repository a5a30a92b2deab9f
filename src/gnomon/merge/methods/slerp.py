"""Spherical interpolation between the base and one other model."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method
from gnomon.merge.sphere import gram, slerp_coefficients

NEARLY_PARALLEL = 0.9995
TINY = 1e-8


def measure(view: TensorView, *, t: float) -> tuple[float, float]:
    """The two coefficients, for the un-normalised tensors."""
    products = gram(view, "ends")
    norms = products.diagonal().sqrt()
    norms = torch.where(norms > TINY, norms, torch.ones_like(norms))
    first, second = slerp_coefficients(products[0, 1] / (norms[0] * norms[1]), t, NEARLY_PARALLEL)
    return float(first), float(second)


@merge_method("slerp", sources=(1, 1), measure=measure)
def slerp(block: Block, measured: tuple[float, float], *, t: float) -> Tensor:
    """Along the great circle from the base (t=0) to the other model (t=1)."""
    first, second = measured
    return (block.base * first).add_(block.models_RC[0], alpha=second)
