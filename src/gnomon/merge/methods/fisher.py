"""Fisher merging (arXiv 2111.09832): average each parameter by how much each model's likelihood depends on it.

Needs `data:` (a text). The diagonal Fisher information is the mean squared gradient of the log-likelihood of tokens
that the model itself samples; parameters that no model depends on are averaged plainly.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.spectral import rows_of, weighted_sum

FLOOR = 1e-8


@merge_method("fisher", base="ignored", whole=True, statistics="fisher", reference="arXiv 2111.09832")
def fisher(block: Block, measured: None, *, weight: PerModel[float] = each(1.0)) -> Tensor:
    """Average weighted by the diagonal Fisher information."""
    plain_RC = weighted_sum(block.models_RC, [share / sum(weight) for share in weight])
    if not block.view.statistics:
        return plain_RC
    information = [rows_of(whole, block) * share for whole, share in zip(block.view.statistics, weight, strict=True)]
    total_RC = sum(information[1:], information[0])
    top_RC = sum((m * f for m, f in zip(block.models_RC, information, strict=True)), torch.zeros_like(plain_RC))
    # relative to the largest, so that the scale of the gradients does not matter
    alive = total_RC > FLOOR * total_RC.max()
    return torch.where(alive, top_RC / torch.where(alive, total_RC, torch.ones_like(total_RC)), plain_RC)
