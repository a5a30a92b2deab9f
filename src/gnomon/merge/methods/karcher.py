"""Karcher mean: the point of the sphere whose squared distances to all models are least, by Riemannian iteration."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method
from gnomon.merge.sphere import gram

TINY = 1e-12


def measure(view: TensorView, *, max_iter: int, tol: float) -> list[float]:
    """Coefficients of the mean in the models' span, from their Gram matrix."""
    products = gram(view, "models")
    norms = products.diagonal().sqrt()
    alive = norms > TINY
    if not bool(alive.any()):
        return [0.0] * len(norms)
    unit = torch.where(alive, 1 / norms.clamp_min(TINY), torch.zeros_like(norms))
    share = alive.double() / alive.sum()
    point = share * unit
    length = (point @ products @ point).clamp_min(0).sqrt()
    point = point / length if length > TINY else torch.where(alive.cumsum(0) == 1, unit, torch.zeros_like(unit))
    for _ in range(max_iter):
        dots = (unit * (products @ point)).clamp(-1, 1)
        theta = torch.acos(dots)
        moves = alive & (theta >= TINY)
        ratio = torch.where(moves, theta / torch.sin(theta).clamp_min(TINY), torch.zeros_like(theta))
        tangent = share * ratio * unit - (share * ratio * dots).sum() * point
        angle = (tangent @ products @ tangent).clamp_min(0).sqrt()
        if angle < tol:
            break
        point = point * torch.cos(angle) + tangent * (torch.sin(angle) / angle)
    return [float(c) for c in point * (share * norms).sum()]


@merge_method("karcher", base="ignored", measure=measure)
def karcher(block: Block, measured: list[float], *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """Riemannian mean of the models' directions, at their mean length; equal weights, no base model."""
    merged_RC = block.models_RC[0] * measured[0]
    for model_RC, coefficient in zip(block.models_RC[1:], measured[1:], strict=True):
        merged_RC.add_(model_RC, alpha=coefficient)
    return merged_RC
