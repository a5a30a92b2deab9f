"""torch's own linear and attention in place of the canonical ones, for the comparison in engine.py only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import gnomon
from gnomon.kernels.batch import RaggedBatch
from gnomon.kernels.operators import LinearWeight


def torch_in_place_of_ours(model: gnomon.Model, *, replace: bool) -> None:
    """Run the model's layers operator by operator; with replace, products and attention are torch's."""
    network: Any = model.network
    network.run_layers = None
    if replace:
        network.operators.linear = linear
        network.operators.attention = attention


def linear(x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
    return torch.nn.functional.linear(x_TK, weight.data, bias_N)


def attention(
    query_THD: Tensor,
    keys: Tensor,
    values: Tensor,
    batch: RaggedBatch,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """scaled_dot_product_attention, sequence by sequence."""
    outputs = []
    for number, span in enumerate(batch.spans):
        rows = slice(int(batch.starts_S[number]), int(batch.starts_S[number + 1]))
        pages, end = torch.tensor(span.pages), span.end
        key, value = (all_[pages].transpose(0, 1).flatten(1, 2)[:, :end] for all_ in (keys, values))
        query = query_THD[rows].transpose(0, 1)
        mask = torch.arange(end) <= torch.arange(span.start, end)[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            query[None], key[None], value[None], attn_mask=mask[None, None], scale=scale, enable_gqa=True
        )
        outputs.append(out[0].transpose(0, 1).flatten(1))
    return torch.cat(outputs)
