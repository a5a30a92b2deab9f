"""Arithmetic of directions, shared by the spherical methods: Gram matrix and slerp coefficients. Scalars in float64."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from gnomon.kernels import merging
from gnomon.merge.blocks import Block, TensorView, total

Vectors = Literal["models", "deltas", "ends"]
"""Of which vectors: the models, their task vectors, or the base followed by the models."""


def gram(view: TensorView, vectors: Vectors) -> Tensor:
    """[n, n] float64: inner products over the whole tensor of each pair."""

    def products(block: Block) -> list[float]:
        if block.native:
            base = block.raw_base if vectors == "deltas" else None
            first = [block.raw_base] if vectors == "ends" and block.raw_base is not None else []
            chunks = merging.gram(base, [*first, *block.raw])
            return [math.fsum(row) for row in chunks.tolist()]
        parts = block.deltas() if vectors == "deltas" else block.models_RC
        parts = [block.base, *parts] if vectors == "ends" else parts
        return [total(parts[i] * parts[j]) for i in range(len(parts)) for j in range(i, len(parts))]

    rows = view.map(products)
    sums = [math.fsum(column) for column in zip(*rows, strict=True)]
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
