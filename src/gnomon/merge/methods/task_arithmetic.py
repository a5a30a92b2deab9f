"""Task arithmetic (arXiv 2212.04089): add, subtract and scale task vectors."""

from __future__ import annotations

from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.deltas import Trim, combine
from gnomon.merge.registry import PerModel, merge_method


@merge_method("task_arithmetic", sources=(0, None), reference="arXiv 2212.04089")
def task_arithmetic(
    block: Block, measured: None, *, weight: PerModel[float], normalize: bool = False, lambda_: float = 1.0
) -> Tensor:
    """Base plus the weighted sum of task vectors; a negative weight takes a task away."""
    trims = [Trim()] * len(block.raw)
    return combine(block, trims, weight=weight, normalize=normalize, scale=lambda_, elect=False)
