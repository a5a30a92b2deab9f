"""Tiny random models of every family in Hugging Face layout, without transformers. Seeded, so always the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}


def tiny_config(family: str, **overrides: Any) -> dict[str, Any]:
    """A config of four layers and 300 tokens."""
    config: dict[str, Any] = {
        "architectures": [CLASSES[family]],
        "model_type": "gemma3_text" if family == "gemma3" else family,
        "vocab_size": 300,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": family == "gemma3",
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "mistral":
        config["sliding_window"] = 70
    if family == "gemma3":
        config |= {
            "hidden_activation": "gelu_pytorch_tanh",
            "query_pre_attn_scalar": 16,
            "sliding_window": 70,
            "rope_local_base_freq": 1000.0,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
        }
    return config | overrides


def tiny_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights with the right names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    name = config["architectures"][0]
    hidden, inner, vocabulary = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    query = config["num_attention_heads"] * config["head_dim"]
    key = config["num_key_value_heads"] * config["head_dim"]
    zero_centred = name.startswith("Gemma")

    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * (1.5 / shape[-1] ** 0.5)

    def norm(size: int) -> torch.Tensor:
        return torch.rand(size, generator=generator) * 0.4 + (0.0 if zero_centred else 0.8)

    tensors = {"model.embed_tokens.weight": weight(vocabulary, hidden) * hidden**0.5, "model.norm.weight": norm(hidden)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(vocabulary, hidden)
    for i in range(config["num_hidden_layers"]):
        at = f"model.layers.{i}"
        for part, size in (("q", query), ("k", key), ("v", key)):
            tensors[f"{at}.self_attn.{part}_proj.weight"] = weight(size, hidden)
            if name.startswith("Qwen2") or config.get("attention_bias"):
                tensors[f"{at}.self_attn.{part}_proj.bias"] = weight(size)
        tensors[f"{at}.self_attn.o_proj.weight"] = weight(hidden, query)
        if name.startswith(("Qwen3", "Gemma3")):
            tensors[f"{at}.self_attn.q_norm.weight"] = norm(config["head_dim"])
            tensors[f"{at}.self_attn.k_norm.weight"] = norm(config["head_dim"])
        tensors[f"{at}.mlp.gate_proj.weight"] = weight(inner, hidden)
        tensors[f"{at}.mlp.up_proj.weight"] = weight(inner, hidden)
        tensors[f"{at}.mlp.down_proj.weight"] = weight(hidden, inner)
        if config.get("attention_bias"):
            tensors[f"{at}.self_attn.o_proj.bias"] = weight(hidden)
        if config.get("mlp_bias"):
            for part, size in (("gate", inner), ("up", inner), ("down", hidden)):
                tensors[f"{at}.mlp.{part}_proj.bias"] = weight(size)
        norms = ["input_layernorm", "post_attention_layernorm"]
        if zero_centred:
            norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
        for part in norms:
            tensors[f"{at}.{part}.weight"] = norm(hidden)
    return tensors


def tiny_tokenizer() -> Tokenizer:
    """Byte-level: three control tokens, then the 256 bytes; a few merges so that some tokens hold several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("Ġ", "the"), ("i", "n"), ("a", "n"), ("an", "d"), ("Ġ", "a"), ("o", "u")]
    tokens = [*SPECIALS, *alphabet, *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIALS)
    return backend


def tiny_pieces_tokenizer() -> Tokenizer:
    """SentencePiece's way: "\u2581" for a space, byte tokens for all else; three control tokens and 300 in all."""
    letters = ["\u2581", *"abcdefghijklmnopqrstuvwxyz"]
    merges = [("h", "e"), ("\u2581", "t"), ("\u2581t", "he"), ("i", "n"), ("e", "r"), ("\u2581", "b"), ("\u2581", "i")]
    tokens = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)} | {SPECIALS[0]: 0}
    backend = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, fuse_unk=True, unk_token=SPECIALS[0]))
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.add_special_tokens(SPECIALS)
    return backend


def write_tiny_model(
    path: Path,
    family: str = "llama",
    *,
    shards: int = 1,
    seed: int = 0,
    tokenizer: Tokenizer | None = None,
    **overrides: Any,
) -> Path:
    """Write config, weights (in `shards` files), tokenizer and chat template; returns the folder."""
    path.mkdir(parents=True, exist_ok=True)
    config = tiny_config(family, **overrides)
    tensors = tiny_tensors(config, seed)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
    else:
        table = {}
        for shard in range(shards):
            part = {name: t for i, (name, t) in enumerate(sorted(tensors.items())) if i % shards == shard}
            file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
            save_file(part, path / file)
            table |= dict.fromkeys(part, file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": table}))
    (tokenizer or tiny_tokenizer()).save(str(path / "tokenizer.json"))
    tokens = {"bos_token": SPECIALS[0], "eos_token": SPECIALS[2], "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(tokens))
    return path
