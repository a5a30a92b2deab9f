"""DecoderConfig: what the decoder needs to know, read from a Hugging Face config of any supported family.

One table row per family says how it differs; anything the network would silently get wrong is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gnomon.errors import UnsupportedModel
from gnomon.kernels.rotary import RotarySpec


@dataclass(frozen=True)
class Family:
    """How a family differs from plain Llama."""

    qkv_bias: bool = False
    head_norms: bool = False
    sandwich_norms: bool = False
    norm_plus_one: bool = False
    scaled_embedding: bool = False
    windowed: bool = False


FAMILIES = {
    "LlamaForCausalLM": Family(),
    "MistralForCausalLM": Family(windowed=True),
    "Qwen2ForCausalLM": Family(qkv_bias=True, windowed=True),
    "Qwen3ForCausalLM": Family(head_norms=True, windowed=True),
    "Gemma3ForCausalLM": Family(
        head_norms=True, sandwich_norms=True, norm_plus_one=True, scaled_embedding=True, windowed=True
    ),
}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu", "gelu_new": "gelu", "gelu_tanh": "gelu"}


@dataclass(frozen=True)
class LayerConfig:
    """One layer's attention. window None: it sees everything before it."""

    rotary: RotarySpec
    window: int | None


@dataclass(frozen=True)
class DecoderConfig:
    """Shapes and switches of one decoder."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    max_context: int
    norm_eps: float
    activation: str
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    tied: bool
    attention_scale: float
    attention_softcap: float | None
    final_softcap: float | None
    layers: tuple[LayerConfig, ...]

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Raises UnsupportedModel naming the architecture or the setting that is not supported."""
        name = (config.get("architectures") or ["(none)"])[0]
        if name not in FAMILIES:
            raise UnsupportedModel(f"The network `{name}` is not one of ours.", hint=f"Ours: {', '.join(FAMILIES)}.")
        family = FAMILIES[name]
        try:
            return cls._read(family, name, config)
        except KeyError as error:
            raise UnsupportedModel(f"The config of this {name} lacks {error}.") from None

    @classmethod
    def _read(cls, family: Family, name: str, config: Mapping[str, Any]) -> DecoderConfig:
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        activation = config.get("hidden_activation") or config.get("hidden_act") or "silu"
        if activation not in ACTIVATIONS:
            raise UnsupportedModel(f"The activation `{activation}` of this {name} is not supported.")
        scalar = config.get("query_pre_attn_scalar") or head_dim
        return cls(
            family=family,
            vocab_size=config["vocab_size"],
            hidden_size=hidden,
            intermediate_size=config["intermediate_size"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            max_context=config["max_position_embeddings"],
            norm_eps=config.get("rms_norm_eps", 1e-6),
            activation=ACTIVATIONS[activation],
            attention_bias=family.qkv_bias or bool(config.get("attention_bias")),
            output_bias=bool(config.get("attention_bias")) and not family.qkv_bias,
            mlp_bias=bool(config.get("mlp_bias")),
            tied=bool(config.get("tie_word_embeddings", name.startswith("Gemma"))),
            attention_scale=1.0 / math.sqrt(scalar),
            attention_softcap=config.get("attn_logit_softcapping"),
            final_softcap=config.get("final_logit_softcapping"),
            layers=_layers(family, config, head_dim),
        )


def _layers(family: Family, config: Mapping[str, Any], head_dim: int) -> tuple[LayerConfig, ...]:
    """Each layer's rotary table and window."""
    count = config["num_hidden_layers"]
    window = config.get("sliding_window") if family.windowed else None
    kinds = config.get("layer_types") or _layer_kinds(config, count, window)
    result = []
    for kind in kinds[:count]:
        if kind not in ("full_attention", "sliding_attention"):
            raise UnsupportedModel(f"The layer type `{kind}` is not supported.")
        sliding = kind == "sliding_attention"
        result.append(LayerConfig(RotarySpec.from_hf(config, head_dim, sliding), window if sliding else None))
    if len(result) != count:
        raise UnsupportedModel(f"`layer_types` names {len(result)} layers, num_hidden_layers is {count}.")
    return tuple(result)


def _layer_kinds(config: Mapping[str, Any], count: int, window: int | None) -> list[str]:
    """Layer kinds of configs from before `layer_types`."""
    if window is None:
        return ["full_attention"] * count
    if (pattern := config.get("sliding_window_pattern")) is not None:
        return ["sliding_attention" if (i + 1) % pattern else "full_attention" for i in range(count)]
    if "use_sliding_window" in config:
        first = config.get("max_window_layers", count) if config["use_sliding_window"] else count
        return ["sliding_attention" if i >= first else "full_attention" for i in range(count)]
    return ["sliding_attention"] * count
