"""Rotary position tables (RoFormer, arXiv 2104.09864) with the scalings in use: linear, llama3, yarn.

Computed once per setting in float64 and rounded once to float32, growing as longer positions are asked for, so that
a 131k-token model costs nothing before it needs it. Legend: R = half of the rotated channels, L positions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gnomon.errors import UnsupportedModel

SUPPORTED = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True)
class RotarySpec:
    """One rotary setting; hashable, so that layers share tables. scaling: sorted items of the config's block."""

    size: int
    theta: float
    scaling: tuple[tuple[str, Any], ...]
    max_context: int

    @classmethod
    def of(cls, size: int, theta: float, scaling: Mapping[str, Any], max_context: int) -> RotarySpec:
        kind = scaling.get("rope_type") or scaling.get("type") or "default"
        if kind not in SUPPORTED:
            raise UnsupportedModel(
                f"The rotary scaling `{kind}` is not supported.", hint=f"Supported: {', '.join(SUPPORTED)}."
            )
        items = {k: v for k, v in scaling.items() if isinstance(v, int | float | bool) and k != "rope_theta"}
        return cls(size, theta, tuple(sorted({**items, "rope_type": kind}.items())), max_context)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], head_dim: int, sliding: bool) -> RotarySpec:
        """One layer's settings, from any spelling in use (rope_theta + rope_scaling, rope_parameters)."""
        block = config.get("rope_parameters") or {}
        kind = "sliding_attention" if sliding else "full_attention"
        if kind in block or "full_attention" in block:
            block = block.get(kind) or block["full_attention"]
        scaling = {**(config.get("rope_scaling") or {}), **block}
        theta = block.get("rope_theta") or config.get("rope_theta") or 10000.0
        if sliding and "rope_local_base_freq" in config and not block:
            theta, scaling = config["rope_local_base_freq"], {}
        partial = block.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
        size, longest = int(head_dim * partial), config["max_position_embeddings"]
        return cls.of(size=size, theta=float(theta), scaling=scaling, max_context=longest)

    def frequencies(self) -> tuple[Tensor, float]:
        """(inverse frequencies [R] float64, factor on cos and sin)."""
        base = 1.0 / self.theta ** (torch.arange(0, self.size, 2, dtype=torch.float64) / self.size)
        s = dict(self.scaling)
        kind = s["rope_type"]
        if kind == "linear":
            return base / s["factor"], 1.0
        if kind == "llama3":
            return _llama3(base, s), 1.0
        if kind == "yarn":
            return _yarn(base, s, self)
        return base, 1.0


def _llama3(base_R: Tensor, s: Mapping[str, Any]) -> Tensor:
    """Llama 3.1: long wavelengths are stretched, short ones kept, a smooth ramp between."""
    original = s["original_max_position_embeddings"]
    low, high = s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / base_R
    ramp = ((original / wavelength) - low) / (high - low)
    mixed = (1 - ramp) * base_R / s["factor"] + ramp * base_R
    stretched = torch.where(wavelength > original / low, base_R / s["factor"], base_R)
    between = (wavelength <= original / low) & (wavelength >= original / high)
    return torch.where(between, mixed, stretched)


def _yarn(base_R: Tensor, s: Mapping[str, Any], spec: RotarySpec) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071, section 3): interpolate by parts, and a temperature on the attention."""
    factor = s["factor"]
    original = s.get("original_max_position_embeddings", spec.max_context)

    def scale(multiplier: float = 1.0) -> float:
        return 0.1 * multiplier * math.log(factor) + 1.0 if factor > 1 else 1.0

    def channel(rotations: float) -> float:
        return spec.size * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(spec.theta))

    low, high = channel(s.get("beta_fast", 32)), channel(s.get("beta_slow", 1))
    if s.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, spec.size - 1)
    ramp = ((torch.arange(spec.size // 2, dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = s.get("attention_factor")
    if attention is None:
        both = s.get("mscale") and s.get("mscale_all_dim")
        attention = scale(s["mscale"]) / scale(s["mscale_all_dim"]) if both else scale()
    return base_R / factor * ramp + base_R * (1 - ramp), float(attention)


class RotaryTable:
    """cos and sin by position, float32 [L, R]."""

    def __init__(self, spec: RotarySpec) -> None:
        self.frequency_R, self.factor = spec.frequencies()
        self.cos_LR = torch.empty(0, self.frequency_R.shape[0])
        self.sin_LR = torch.empty(0, self.frequency_R.shape[0])

    def at(self, positions_T: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) -> [T, R] each."""
        needed = int(positions_T.max()) + 1
        if needed > self.cos_LR.shape[0]:
            self._grow(max(needed, 2 * self.cos_LR.shape[0], 1024))
        return self.cos_LR[positions_T], self.sin_LR[positions_T]

    def _grow(self, length: int) -> None:
        angle_LR = torch.arange(length, dtype=torch.float64)[:, None] * self.frequency_R
        self.cos_LR = (angle_LR.cos() * self.factor).float()
        self.sin_LR = (angle_LR.sin() * self.factor).float()
