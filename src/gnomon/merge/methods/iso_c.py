"""ISO-C (arXiv 2502.04959): add task vectors and flatten the sum's spectrum to its mean.

Not in mergekit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.spectral import is_matrix, rows_of, weighted_sum, whole_deltas


def measure(view: TensorView, *, weight: list[float]) -> Tensor | None:
    """The sum with all singular values at their mean; None for what is averaged."""
    if not is_matrix(view):
        return None
    u, s, v = torch.linalg.svd(weighted_sum(whole_deltas(view), weight), full_matrices=False)
    flat: Tensor = (u @ v) * s.mean()
    return flat


@merge_method("iso_c", measure=measure, whole=True, reference="arXiv 2502.04959")
def iso_c(
    block: Block, measured: Tensor | None, *, weight: PerModel[float] = each(1.0), lambda_: float = 1.0
) -> Tensor:
    """The tasks' sum made isotropic; everything but matrices is averaged."""
    if measured is None:
        return block.base + weighted_sum(block.deltas(), [share / len(weight) for share in weight]) * lambda_
    return block.base + rows_of(measured, block) * lambda_
