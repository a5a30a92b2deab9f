"""GGUF's names and metadata in Hugging Face's words: tensor names, config.json, per architecture.

One table row per architecture. Knows no tensors, only names and numbers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from gnomon.errors import UnsupportedModel

LAYER_PARTS = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
SANDWICH_PARTS = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
    "gemma3": ("Gemma3ForCausalLM", "gemma3_text"),
}
PERMUTED = ("llama",)
"""Architectures whose query and key rows llama.cpp stores in another order (rotary pairs interleaved)."""
NORM_PLUS_ONE = ("gemma3",)
"""Architectures whose norm weights GGUF stores as 1 + w, where Hugging Face stores w."""
IGNORED = ("rope_freqs.weight",)


def architecture(metadata: Mapping[str, Any]) -> str:
    """The file's architecture, checked."""
    name = str(metadata.get("general.architecture", ""))
    if name not in ARCHITECTURES:
        raise UnsupportedModel(
            f"GGUF architecture `{name}` is not supported.", hint=f"Supported: {', '.join(ARCHITECTURES)}."
        )
    return name


def tensor_name(name: str, arch: str) -> str | None:
    """GGUF tensor name -> Hugging Face's; None for one that has no counterpart there."""
    if name in TOP:
        return TOP[name]
    if name in IGNORED:
        return None
    parts = {**LAYER_PARTS, **(SANDWICH_PARTS if arch == "gemma3" else {})}
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if match is None or match[2] not in parts:
        raise UnsupportedModel(f"GGUF tensor `{name}` has no place in architecture `{arch}`.")
    return f"model.layers.{match[1]}.{parts[match[2]]}.{match[3]}"


def config(metadata: Mapping[str, Any], *, vocabulary: int, tied: bool) -> dict[str, Any]:
    """GGUF metadata as the content of config.json."""
    arch = architecture(metadata)

    def get(key: str, default: Any = None) -> Any:
        value = metadata.get(f"{arch}.{key}", default)
        return value.tolist() if hasattr(value, "tolist") else value

    def need(key: str) -> Any:
        value = get(key)
        if value is None:
            raise UnsupportedModel(f"The GGUF metadata lacks `{arch}.{key}`.")
        return value

    heads, hidden = need("attention.head_count"), need("embedding_length")
    class_name, model_type = ARCHITECTURES[arch]
    tokens = {key: metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
    result: dict[str, Any] = {
        "architectures": [class_name],
        "model_type": model_type,
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": get("attention.key_length") or hidden // heads,
        "max_position_embeddings": need("context_length"),
        # GGUF stores these as float32; the decimal that was meant is the shortest one that rounds to it.
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(get("rope.freq_base", 10000.0)),
        "tie_word_embeddings": tied,
        "bos_token_id": tokens["bos"],
        "eos_token_id": tokens["eos"],
        "hidden_act": "silu",
        "torch_dtype": "float32",
    }
    scaling = get("rope.scaling.type")
    if scaling and scaling != "none":
        original = get("rope.scaling.original_context_length")
        block = {"rope_type": scaling, "factor": get("rope.scaling.factor", 1.0)}
        result["rope_scaling"] = {**block, **({"original_max_position_embeddings": original} if original else {})}
    if arch == "gemma3":
        layers = need("block_count")
        result |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": result["head_dim"],
            "sliding_window": need("attention.sliding_window"),
            "rope_local_base_freq": 10000.0,
            "layer_types": ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(layers)],
        }
    return result


def _shortest(value: float) -> float:
    """float32 1e-6 reads back as 9.99999997e-07: give the decimal that was meant."""
    import numpy as np

    return float(str(np.float32(value)))
