"""Nearswap: take the other model where it is near the base, less of it the farther it is."""

from __future__ import annotations

from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.registry import merge_method


@merge_method("nearswap", sources=(1, 1))
def nearswap(block: Block, measured: None, *, t: float) -> Tensor:
    """Interpolate by min(1, t / |difference|), element by element."""
    model_RC = block.models_RC[0]
    share_RC = (t / (block.base - model_RC).abs().clamp_min(1e-6)).clamp(0, 1)
    return share_RC * model_RC + (1 - share_RC) * block.base
