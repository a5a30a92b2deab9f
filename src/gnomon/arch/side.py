"""From a patch's low-rank factors by tensor name, and its wrappers, to a SidePath for our decoder.

Fused projections keep their names: a delta of `v_proj` knows at which column of the fused product its outputs begin.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gnomon.arch.config import DecoderConfig
from gnomon.errors import PatchError
from gnomon.kernels.operators import LinearWeight
from gnomon.kernels.side import SideDelta, SideEmbedding, SidePath
from gnomon.kernels.wrappers import Wrapping, make_wrapper
from gnomon.models.patch.wrapper import Wrapper

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
PROJECTION = re.compile(r"model\.layers\.(\d+)\.(?:self_attn|mlp)\.(q|k|v|o|gate|up|down)_proj\.weight")
ORDER = ["q", "k", "v", "o", "gate", "up", "down"]


def build_side_path(
    factors: Mapping[str, tuple[Tensor, Tensor]], wrappers: Mapping[str, Wrapper], config: DecoderConfig
) -> SidePath:
    """factors: up [N, r] and down [r, K] by Hugging Face tensor name, shapes already checked against the weights."""
    query, key = config.heads * config.head_dim, config.kv_heads * config.head_dim
    offsets = [0, query, query + key, 0, 0, config.intermediate_size, 0]
    layers: list[list[SideDelta | None]] = [[None] * len(ORDER) for _ in config.layers]
    embedding, head = None, None
    for name, (up, down) in factors.items():
        if (found := PROJECTION.fullmatch(name)) is not None:
            slot = ORDER.index(found[2])
            layers[int(found[1])][slot] = SideDelta(side_weight(up), side_weight(down), offsets[slot])
        elif name == EMBEDDING:
            embedding = SideEmbedding(up.to(torch.float32).contiguous(), side_weight(down.T))
        elif name != HEAD:
            raise cannot_run(name)
        if name == HEAD or (name == EMBEDDING and config.tied):
            head = SideDelta(side_weight(up), side_weight(down))
    return SidePath(tuple(tuple(layer) for layer in layers), embedding, head, wrappers=_wrapped(wrappers, config))


def _wrapped(wrappers: Mapping[str, Wrapper], config: DecoderConfig) -> dict[int, tuple[Wrapping, ...]]:
    """By layer. Raises PatchError for a layer that is not there or sizes of another network."""
    found: dict[int, tuple[Wrapping, ...]] = {}
    ours = {"C": config.hidden_size, "M": config.intermediate_size}
    for name, one in wrappers.items():
        sizes = one.sizes()
        wrong = [f"{axis} = {sizes[axis]}, not {size}" for axis, size in ours.items() if sizes.get(axis, size) != size]
        if one.layer >= len(config.layers) or wrong:
            what = ", ".join(wrong) or f"the model has layers 0..{len(config.layers) - 1}"
            raise PatchError(f"The patch's `{name}` does not fit this model: {what}.")
        made = make_wrapper(one.kind, one.tensors, gelu=config.activation != "silu")
        found[one.layer] = (*found.get(one.layer, ()), made)
    return found


def side_weight(tensor: Tensor) -> LinearWeight:
    """A factor as the operators' float32 kind, which every profile can multiply."""
    data = tensor.to(torch.float32).contiguous()
    return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=data)


def cannot_run(name: str) -> PatchError:
    return PatchError(
        f"A delta of `{name}` cannot run beside the weights: only projections, the embedding and the head can.",
        hint="Apply the patch to the weights instead: gnomon.load('MODEL+FILE.patch.safetensors').",
    )
