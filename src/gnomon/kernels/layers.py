"""What a run of decoder layers is, for operators that compute it in one call.

Only data: the decoder describes its layers once; native_operators turns the description into C structures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from gnomon.kernels.batch import RaggedBatch
from gnomon.kernels.operators import LinearWeight

MOST_TABLES = 4
"""Rotary tables of one run."""
Weighted = tuple[tuple[LinearWeight, Tensor | None], ...]
"""Weights of one input with their biases, outputs side by side."""


@dataclass(frozen=True)
class LayerPlan:
    """One layer. following_norm: the next layer's first norm, or the final one. rotary: which of the step's tables."""

    query_key_value: Weighted
    attention_out: Weighted
    gate_up: Weighted
    down: Weighted
    query_norm: Tensor | None
    key_norm: Tensor | None
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    post_mlp_norm: Tensor | None
    following_norm: Tensor
    window: int | None
    rotary: int


@dataclass(frozen=True)
class LayersShape:
    """Numbers all layers share. softcap: of attention scores."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    eps: float
    scale: float
    softcap: float | None
    gelu: bool


class LayersRun(Protocol):
    """Layers ready to run."""

    def __call__(
        self,
        normed_TC: Tensor,
        residual_TC: Tensor,
        batch: RaggedBatch,
        pages: list[tuple[Tensor, Tensor]],
        turns: list[tuple[Tensor, Tensor]],
        layers: range,
    ) -> None:
        """These adjacent layers, in place: normed ends under the last one's following_norm.

        turns: cos, sin [T, R] per rotary table.
        """
