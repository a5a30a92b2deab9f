"""Weighted barycentre on the sphere, by one logarithm and one exponential map at the normalised mean."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.errors import MergeError
from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, merge_method
from gnomon.merge.sphere import gram


def measure(view: TensorView, *, weight: list[float], normalize_weights: bool, eps: float) -> list[float]:
    """One coefficient per vector: the result lies in their span, so everything follows from their Gram matrix."""
    if len(weight) == 1:
        return [1.0]
    products = gram(view, "models" if view.base_reader is None else "deltas")
    share = torch.tensor(weight, dtype=torch.float64)
    if normalize_weights:
        share = share / share.sum()
    norms = products.diagonal().sqrt()
    unit = 1 / (norms + eps)  # u_i = unit_i * x_i
    mean = share * unit  # the mean's coefficients
    length = (mean @ products @ mean).clamp_min(0).sqrt()
    radius = float((share * norms).sum())
    if length < eps:
        if len(weight) != 2:
            raise MergeError(
                f"`{view.name}`: the weighted directions cancel, so multislerp has no answer.", hint="Change a weight."
            )
        return [float(c) for c in share]
    mean = mean / length
    projections = unit * (products @ mean)  # <u_i, m>
    tangent = share * unit - (share * projections).sum() * mean
    angle = (tangent @ products @ tangent).clamp_min(0).sqrt()
    if angle > eps:
        mean = mean * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    return [float(c) for c in mean * radius]


@merge_method("multislerp", base="optional", measure=measure)
def multislerp(
    block: Block,
    measured: list[float],
    *,
    weight: PerModel[float],
    normalize_weights: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Spherical average of any number of models (or, with a base, task vectors)."""
    vectors_RC = block.vectors()
    merged_RC = vectors_RC[0] * measured[0]
    for vector_RC, coefficient in zip(vectors_RC[1:], measured[1:], strict=True):
        merged_RC.add_(vector_RC, alpha=coefficient)
    return merged_RC if block.base_RC is None else block.base_RC + merged_RC
