"""Passthrough: one model's tensor as it is, possibly scaled; what stacked ("franken") merges are made of."""

from __future__ import annotations

from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.registry import PerModel, each, merge_method


@merge_method("passthrough", base="ignored", sources=(1, 1))
def passthrough(block: Block, measured: None, *, scale: PerModel[float | None] = each(None)) -> Tensor:
    """One model's tensor, times `scale` where given."""
    return block.models_RC[0] if scale[0] is None else block.models_RC[0] * scale[0]
