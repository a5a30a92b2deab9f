"""Whole matrices for the methods that need a singular value decomposition: gathering them, and what they share.

These methods hold a tensor's task vectors at once (the planner counts that); tensors that are no matrices, and tables
of tokens, are averaged.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.layout import TABLES


def is_matrix(view: TensorView) -> bool:
    return len(view.shape) == 2 and min(view.shape) > 1 and not any(table in view.name for table in TABLES)


def whole_deltas(view: TensorView) -> list[Tensor]:
    """Every model's task vector, [M, N] float32."""
    parts = view.map(lambda block: [delta_RC.float() for delta_RC in block.deltas()])
    return [torch.cat(rows) for rows in zip(*parts, strict=True)]


def weighted_sum(deltas: Sequence[Tensor], weight: Sequence[float]) -> Tensor:
    total = deltas[0] * weight[0]
    for delta, share in zip(deltas[1:], weight[1:], strict=True):
        total.add_(delta, alpha=share)
    return total


def rows_of(whole_MN: Tensor, block: Block) -> Tensor:
    """The part of a whole matrix that lies where a block lies."""
    like = block.models_RC[0]
    return whole_MN.reshape(-1)[block.start : block.start + like.numel()].reshape(like.shape).to(like.dtype)


def nearest_orthogonal(matrix_MN: Tensor) -> Tensor:
    """The orthogonal Procrustes factor: of the matrix's decomposition P D Q^T, P Q^T."""
    p, _, q = torch.linalg.svd(matrix_MN, full_matrices=False)
    orthogonal: Tensor = p @ q
    return orthogonal
