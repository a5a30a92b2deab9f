"""Modules whose forward is a reduction written out in small steps: RMSNorm, rotary tables, scaled embeddings.

Their class is recognised by name and believed by test: a replacement is used only where it agrees with the module's own
forward on a probe. Anything else runs as it is, and the coverage check then names what it reached.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.errors import GnomonError
from gnomon.kernels.rotary import RotarySpec, RotaryTable

Forward = Callable[..., Any]
EPSILONS = ("variance_epsilon", "eps", "epsilon")


def replacement(module: nn.Module, profile: str) -> Forward | None:
    """The canonical forward of this module's class: called as f(module, *args, **kwargs). None: keep its own."""
    name = type(module).__name__
    if name.endswith("RMSNorm"):
        return _norm(module, profile)
    if name.endswith("RotaryEmbedding"):
        return _rotary(module)
    if isinstance(module, nn.Embedding) and hasattr(module, "scalar_embed_scale"):
        return _scaled_embedding(profile)
    return None


def _norm(module: nn.Module, profile: str) -> Forward | None:
    weight = getattr(module, "weight", None)
    epsilon = next((name for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or epsilon is None:
        return None
    probe = copy.deepcopy(module).float()
    size = weight.shape[0]
    steps = torch.arange(2 * size, dtype=torch.float32).reshape(2, size)
    x, scaled = torch.sin(steps * 1.7), 0.5 + torch.cos(steps[0] * 0.9) / 4
    with torch.no_grad():
        probe.weight.copy_(scaled)  # type: ignore[operator]
        own = probe(x)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon))
    if not isinstance(own, Tensor):
        return None
    for plus in (0.0, 1.0):
        if torch.allclose(own, normed * (scaled + plus), rtol=1e-3, atol=1e-4):
            return _rms_norm(epsilon, plus, profile)
    return None


def _rms_norm(epsilon: str, plus: float, profile: str) -> Forward:
    def forward(module: Any, hidden: Tensor) -> Tensor:
        weight = torch.ops.gnomon.held(module.weight, profile)
        if plus:
            weight = weight + plus
        return torch.ops.gnomon.rms_norm(hidden, weight, getattr(module, epsilon), profile)  # type: ignore[no-any-return]

    return forward


def _rotary(module: Any) -> Forward | None:
    """cos and sin from float64 tables by absolute position, as the decoder takes them."""
    kinds = getattr(module, "layer_types", None) or ["full_attention"]
    tables = {}
    try:
        config = module.config.to_dict()
        size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        for kind in kinds:
            tables[kind] = RotaryTable(RotarySpec.from_hf(config, size, kind == "sliding_attention"))
    except (GnomonError, AttributeError, KeyError, TypeError):
        return None

    def forward(module: Any, x: Tensor, position_ids: Tensor, layer_type: str = "full_attention") -> Any:
        table = tables[layer_type] if len(tables) > 1 else next(iter(tables.values()))
        cos, sin = table.at(position_ids.reshape(-1))
        shape = (*position_ids.shape, -1)
        return torch.cat([cos, cos], -1).reshape(shape), torch.cat([sin, sin], -1).reshape(shape)

    x, positions = torch.zeros(1, 1), torch.tensor([[0, 1, 5, 100]])
    for kind in kinds:
        arguments = (x, positions, kind) if getattr(module, "layer_types", None) else (x, positions)
        with torch.no_grad():
            own, ours = module(*arguments), forward(module, *arguments)
        if any(
            a.shape != b.shape or not torch.allclose(a.float(), b, rtol=1e-3, atol=1e-4)
            for a, b in zip(own, ours, strict=True)
        ):
            return None
    return forward


def _scaled_embedding(profile: str) -> Forward:
    def forward(module: Any, input_ids: Tensor) -> Tensor:
        rows = torch.nn.functional.embedding(input_ids, module.weight, module.padding_idx)
        scale = torch.tensor(float(module.scalar_embed_scale), dtype=torch.float32)
        return torch.ops.gnomon.held(rows, profile) * scale  # type: ignore[no-any-return]

    return forward


def attention_scale(given: float | None, size: int) -> float:
    return 1.0 / math.sqrt(size) if given is None else given
