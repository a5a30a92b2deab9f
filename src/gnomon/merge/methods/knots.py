"""KnOTS (arXiv 2410.19735): bring task vectors into one basis by a joint decomposition, then merge them there (TIES).

Not in mergekit. Made for LoRA task vectors, whose own bases do not match. Legend: M rows, N columns, k common rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import PerModel, each, find_method, merge_method
from gnomon.merge.shares import check_density
from gnomon.merge.spectral import is_matrix, rows_of, weighted_sum, whole_deltas


def measure(view: TensorView, *, weight: list[float], density: list[float]) -> Tensor | None:
    """The merged task vector of a matrix; None for what is averaged."""
    if not is_matrix(view):
        return None
    deltas = whole_deltas(view)
    u_Mk, s_k, v_k = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    blocks_kN = v_k.split(view.shape[1], dim=1)
    ties = find_method("ties")
    from gnomon.merge.tensors import merge_view, view_of

    common = torch.zeros_like(blocks_kN[0])
    inner = view_of(ties, [part.contiguous() for part in blocks_kN], common, view.random, name=view.name)
    given = ties.resolve({"weight": weight, "density": density, "normalize": True}, len(deltas))
    merged: Tensor = (u_Mk * s_k) @ merge_view(ties, inner, given, torch.float32)
    return merged


@merge_method("knots", measure=measure, check=check_density, whole=True, reference="arXiv 2410.19735")
def knots(
    block: Block,
    measured: Tensor | None,
    *,
    weight: PerModel[float] = each(1.0),
    density: PerModel[float] = each(1.0),
    lambda_: float = 1.0,
) -> Tensor:
    """TIES in the tasks' common singular basis; everything but matrices is averaged."""
    if measured is None:
        return block.base + weighted_sum(block.deltas(), [share / len(weight) for share in weight]) * lambda_
    return block.base + rows_of(measured, block) * lambda_
