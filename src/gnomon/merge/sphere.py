"""Arithmetic of directions, shared by the spherical methods: Gram matrix and slerp coefficients. Scalars in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView


def gram(view: TensorView, vectors: Callable[[Block], Sequence[Tensor]]) -> Tensor:
    """[n, n] float64: inner products over the whole tensor of each pair of vectors(block)."""

    def products(block: Block) -> list[Tensor]:
        parts = vectors(block)
        return [parts[i] * parts[j] for i in range(len(parts)) for j in range(i, len(parts))]

    sums = view.sums(products) if view.numel else []
    count = math.isqrt(2 * len(sums)) if sums else len(view.readers)
    table = torch.zeros(count, count, dtype=torch.float64)
    places = [(i, j) for i in range(count) for j in range(i, count)]
    for (i, j), value in zip(places, sums, strict=False):
        table[i, j] = table[j, i] = value
    return table


def slerp_coefficients(dot: Tensor, t: float, nearly_parallel: float) -> tuple[Tensor, Tensor]:
    """Weights of the two ends for the cosine `dot` (any shape, float64): spherical, linear where nearly parallel."""
    dot = dot.clamp(-1, 1)
    theta = torch.acos(dot)
    sine = torch.sin(theta)
    linear = (dot.abs() > nearly_parallel) | (sine == 0)
    safe = torch.where(linear, torch.ones_like(sine), sine)
    first = torch.where(linear, torch.full_like(dot, 1 - t), torch.sin((1 - t) * theta) / safe)
    second = torch.where(linear, torch.full_like(dot, t), torch.sin(t * theta) / safe)
    return first, second
