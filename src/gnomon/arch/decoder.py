"""One decoder for the Llama family and its relatives: Llama, SmolLM, Mistral, Qwen 2/2.5/3, Gemma 3.

Driven by DecoderConfig, running on the canonical operators, on one packed ragged batch. What a family does
differently is a switch here, not a subclass.
Legend: T packed tokens, C hidden channels, H query heads, G key-value heads, D head size, R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnomon.arch.config import DecoderConfig, LayerConfig
from gnomon.arch.network import NONE, Pages
from gnomon.arch.side import build_side_path
from gnomon.arch.weights import Projection, WeightLoader
from gnomon.errors import UsageError
from gnomon.kernels.batch import PAGE, RaggedBatch
from gnomon.kernels.layers import MOST_TABLES, LayerPlan, LayersShape
from gnomon.kernels.operators import Operators
from gnomon.kernels.rotary import RotarySpec, RotaryTable
from gnomon.kernels.side import SidePath, SideRows, add_embedding, add_head, add_layer
from gnomon.kernels.wrappers import Site, wrap_mlp, wrap_stream, wrapped_layers
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.wrapper import Wrapper

QUERY_KEY_VALUE, ATTENTION_OUT, GATE_UP, DOWN = range(3), range(3, 4), range(4, 6), range(6, 7)
"""Side-path slots of the fused products."""


@dataclass(frozen=True)
class Layer:
    """One layer's weights. The two `post` norms and the head norms exist in some families only."""

    config: LayerConfig
    attention_norm: Tensor
    query_key_value: Projection
    query_norm: Tensor | None
    key_norm: Tensor | None
    attention_out: Projection
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    gate_up: Projection
    down: Projection
    post_mlp_norm: Tensor | None


class Decoder:
    """Implements `Network`."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators) -> None:
        config = DecoderConfig.from_hf(checkpoint.config)
        self.architecture: str = checkpoint.config["architectures"][0]
        self.config = config
        self.operators = operators
        self.vocab_size = config.vocab_size
        self.hidden_size = config.hidden_size
        self.max_context = config.max_context
        self.page_bytes = 2 * 4 * len(config.layers) * config.kv_heads * PAGE * config.head_dim
        loader = WeightLoader(checkpoint, operators)
        self.embedding = loader.table("model.embed_tokens.weight", config.vocab_size, config.hidden_size)
        self.layers = [_load_layer(loader, config, i) for i in range(len(config.layers))]
        add_one = config.family.norm_plus_one
        self.final_norm = loader.vector("model.norm.weight", config.hidden_size, add_one=add_one)
        self.head = (
            self.embedding if config.tied else loader.table("lm_head.weight", config.vocab_size, config.hidden_size)
        )
        self.embedding_scale = math.sqrt(config.hidden_size) if config.family.scaled_embedding else None
        self.rotary = {layer.rotary: RotaryTable(layer.rotary) for layer in config.layers}
        self.run_layers = operators.layers(self._plans(), _shape(config)) if self._one_turn() else None
        self._live = loader.live
        self._derived = loader.derived

    def new_pages(self, count: int) -> Pages:
        shape = (count, self.config.kv_heads, PAGE, self.config.head_dim)
        zeros = getattr(self.operators, "zeros", lazy_zeros)  # a GPU keeps its pages itself
        return [(zeros(shape), zeros(shape)) for _ in self.layers]

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, pages: Pages) -> Tensor:
        ops, config = self.operators, self.config
        turns = {spec: table.at(batch.positions_T) for spec, table in self.rotary.items()}
        residual_TC = ops.embedding(self.embedding, batch.token_ids_T)
        add_embedding(batch.side_rows, batch.token_ids_T, residual_TC, ops)
        if self.embedding_scale is not None:
            residual_TC = residual_TC * torch.tensor(self.embedding_scale, dtype=torch.float32)
        normed_TC = ops.rms_norm(residual_TC, self.layers[0].attention_norm, config.norm_eps)
        for part, whole in _runs(wrapped_layers(batch.side_rows), len(self.layers)):
            if self.run_layers is not None and whole:
                self.run_layers(normed_TC, residual_TC, batch, pages, list(turns.values()), part)
                continue
            for index in part:
                normed_TC, residual_TC = self._layer(index, normed_TC, residual_TC, batch, pages[index], turns)
        return normed_TC

    def _layer(
        self,
        index: int,
        normed_TC: Tensor,
        residual_TC: Tensor,
        batch: RaggedBatch,
        pages: tuple[Tensor, Tensor],
        turns: dict[RotarySpec, tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """One layer by its operators -> what enters the next one: normed, and the residual stream."""
        ops, config, layer = self.operators, self.config, self.layers[index]
        mixed_TC = self._attention(index, normed_TC, batch, pages, turns)
        if layer.post_attention_norm is not None:
            mixed_TC = ops.rms_norm(mixed_TC, layer.post_attention_norm, config.norm_eps)
        normed_TC, residual_TC = ops.add_rms_norm(mixed_TC, residual_TC, layer.mlp_norm, config.norm_eps)
        fed_TC = self._mlp(index, normed_TC, batch)
        if layer.post_mlp_norm is not None:
            fed_TC = ops.rms_norm(fed_TC, layer.post_mlp_norm, config.norm_eps)
        wrap_stream(batch.side_rows, index, residual_TC, fed_TC, ops)
        last = index + 1 == len(self.layers)
        following = self.final_norm if last else self.layers[index + 1].attention_norm
        return ops.add_rms_norm(fed_TC, residual_TC, following, config.norm_eps)

    def _one_turn(self) -> bool:
        """Whether all rotary tables have one width and are few enough for one native call."""
        return len({spec.size for spec in self.rotary}) == 1 and len(self.rotary) <= MOST_TABLES

    def _plans(self) -> list[LayerPlan]:
        tables = list(self.rotary)
        following = [layer.attention_norm for layer in self.layers[1:]] + [self.final_norm]
        return [
            LayerPlan(
                query_key_value=layer.query_key_value.weighted,
                attention_out=layer.attention_out.weighted,
                gate_up=layer.gate_up.weighted,
                down=layer.down.weighted,
                query_norm=layer.query_norm,
                key_norm=layer.key_norm,
                post_attention_norm=layer.post_attention_norm,
                mlp_norm=layer.mlp_norm,
                post_mlp_norm=layer.post_mlp_norm,
                following_norm=norm,
                window=layer.config.window,
                rotary=tables.index(layer.config.rotary),
            )
            for layer, norm in zip(self.layers, following, strict=True)
        ]

    def _attention(
        self,
        index: int,
        normed_TC: Tensor,
        batch: RaggedBatch,
        pages: tuple[Tensor, Tensor],
        turns: dict[RotarySpec, tuple[Tensor, Tensor]],
    ) -> Tensor:
        ops, c, layer = self.operators, self.config, self.layers[index]
        rows = normed_TC.shape[0]
        fused = layer.query_key_value(normed_TC)
        add_layer(batch.side_rows, index, QUERY_KEY_VALUE, normed_TC, fused, ops)
        joined = fused.view(rows, c.heads + 2 * c.kv_heads, c.head_dim)
        query_THD, key_TGD, value_TGD = (
            p.contiguous() for p in torch.split(joined, [c.heads, c.kv_heads, c.kv_heads], dim=1)
        )
        if layer.query_norm is not None and layer.key_norm is not None:
            query_THD = ops.rms_norm(query_THD, layer.query_norm, c.norm_eps)
            key_TGD = ops.rms_norm(key_TGD, layer.key_norm, c.norm_eps)
        cos, sin = turns[layer.config.rotary]
        query_THD, key_TGD = ops.rotary(query_THD, cos, sin), ops.rotary(key_TGD, cos, sin)
        keys, values = pages
        ops.write_pages(key_TGD, value_TGD, keys, values, batch)
        mixed = ops.attention(
            query_THD,
            keys,
            values,
            batch,
            scale=c.attention_scale,
            window=layer.config.window,
            softcap=c.attention_softcap,
        )
        out_TC = layer.attention_out(mixed)
        add_layer(batch.side_rows, index, ATTENTION_OUT, mixed, out_TC, ops)
        return out_TC

    def _mlp(self, index: int, normed_TC: Tensor, batch: RaggedBatch) -> Tensor:
        ops, layer = self.operators, self.layers[index]
        gate_up = layer.gate_up(normed_TC)
        add_layer(batch.side_rows, index, GATE_UP, normed_TC, gate_up, ops)
        gated = (ops.silu_mul if self.config.activation == "silu" else ops.gelu_mul)(gate_up)
        out_TC = layer.down(gated)
        add_layer(batch.side_rows, index, DOWN, gated, out_TC, ops)
        wrap_mlp(batch.side_rows, index, Site(normed_TC, gated), out_TC, ops)
        return out_TC

    def side_path(
        self, factors: Mapping[str, tuple[Tensor, Tensor]], wrappers: Mapping[str, Wrapper] = NONE
    ) -> SidePath:
        return build_side_path(factors, wrappers, self.config)

    @torch.inference_mode()
    def logits(self, hidden_RC: Tensor, sides: Sequence[SideRows] = ()) -> Tensor:
        logits_RV = self.operators.linear(hidden_RC, self.head)
        add_head(sides, hidden_RC, logits_RV, self.operators)
        cap = self.config.final_softcap
        return (logits_RV if cap is None else cap * torch.tanh(logits_RV / cap)).cpu()

    def tensors(self) -> dict[str, Tensor]:
        if self.operators.dtype not in ("fp32", "bf16"):
            raise UsageError(
                f"The profile `{self.operators.dtype}` packs its weights: they cannot be shared or changed.",
                hint="Load with profile='fp32' or 'bf16'.",
                param="profile",
            )
        return dict(self._live)

    @torch.no_grad()
    def refresh(self) -> None:
        """After weights were changed in place: round them to the profile again, renew what is derived from them."""
        if self.operators.dtype == "bf16":
            for tensor in self._live.values():
                tensor.copy_(tensor.to(torch.bfloat16))
        for derived in self._derived:
            derived.renew()


def _runs(wrapped: list[int], count: int) -> Iterator[tuple[range, bool]]:
    """Layers 0..count as (range, whether it may run as one call): every wrapped layer alone, the rest between."""
    begin = 0
    for layer in wrapped:
        if begin < layer:
            yield range(begin, layer), True
        yield range(layer, layer + 1), False
        begin = layer + 1
    if begin < count:
        yield range(begin, count), True


def _shape(c: DecoderConfig) -> LayersShape:
    return LayersShape(
        hidden=c.hidden_size,
        heads=c.heads,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        inner=c.intermediate_size,
        eps=c.norm_eps,
        scale=c.attention_scale,
        softcap=c.attention_softcap,
        gelu=c.activation != "silu",
    )


def lazy_zeros(shape: tuple[int, ...]) -> Tensor:
    """Zeros that take no memory until they are written: numpy asks the system for zeroed pages, torch fills them."""
    return torch.from_numpy(np.zeros(shape, np.float32))


def _load_layer(loader: WeightLoader, c: DecoderConfig, index: int) -> Layer:
    """One layer's tensors by their Hugging Face names."""
    at, family = f"model.layers.{index}", c.family
    hidden, q_size, kv_size = c.hidden_size, c.heads * c.head_dim, c.kv_heads * c.head_dim

    def norm(name: str, size: int = hidden) -> Tensor:
        return loader.vector(f"{at}.{name}.weight", size, add_one=family.norm_plus_one)

    qkv = [f"{at}.self_attn.{name}_proj" for name in ("q", "k", "v")]
    sandwich = family.sandwich_norms
    return Layer(
        config=c.layers[index],
        attention_norm=norm("input_layernorm"),
        query_key_value=loader.projection(qkv, [q_size, kv_size, kv_size], hidden, bias=c.attention_bias),
        query_norm=norm("self_attn.q_norm", c.head_dim) if family.head_norms else None,
        key_norm=norm("self_attn.k_norm", c.head_dim) if family.head_norms else None,
        attention_out=loader.projection([f"{at}.self_attn.o_proj"], [hidden], q_size, bias=c.output_bias),
        post_attention_norm=norm("post_attention_layernorm") if sandwich else None,
        mlp_norm=norm("pre_feedforward_layernorm" if sandwich else "post_attention_layernorm"),
        gate_up=loader.projection(
            [f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"], [c.intermediate_size] * 2, hidden, bias=c.mlp_bias
        ),
        down=loader.projection([f"{at}.mlp.down_proj"], [hidden], c.intermediate_size, bias=c.mlp_bias),
        post_mlp_norm=norm("post_feedforward_layernorm") if sandwich else None,
    )
