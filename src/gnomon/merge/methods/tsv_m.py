"""TSV-M (arXiv 2412.00081): keep each task's first singular vectors, make all tasks' orthogonal to one another, add.

Not in mergekit. Legend: T tasks, M rows, N columns, r = min(M, N) / T kept per task.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.spectral import is_matrix, nearest_orthogonal, rows_of, weighted_sum, whole_deltas


def measure(view: TensorView, *, weight: list[float]) -> Tensor | None:
    """The merged task vector of a matrix; None for what is averaged."""
    if not is_matrix(view):
        return None
    deltas = [delta * share for delta, share in zip(whole_deltas(view), weight, strict=True)]
    if len(deltas) == 1:
        return deltas[0]
    kept = max(1, min(view.shape) // len(deltas))
    us, values, vs = [], [], []
    for delta_MN in deltas:
        u, s, v = torch.linalg.svd(delta_MN, full_matrices=False)
        us.append(u[:, :kept])
        values.append(s[:kept])
        vs.append(v[:kept])
    u_Mk, v_kN = nearest_orthogonal(torch.cat(us, dim=1)), nearest_orthogonal(torch.cat(vs, dim=0))
    return (u_Mk * torch.cat(values)) @ v_kN


@merge_method("tsv_m", measure=measure, whole=True, reference="arXiv 2412.00081")
def tsv_m(
    block: Block, measured: Tensor | None, *, weight: PerModel[float] = each(1.0), lambda_: float = 1.0
) -> Tensor:
    """Task singular vectors without interference; everything but matrices is averaged."""
    if measured is None:
        return block.base + weighted_sum(block.deltas(), [share / len(weight) for share in weight]) * lambda_
    return block.base + rows_of(measured, block) * lambda_
