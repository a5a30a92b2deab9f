"""Wrappers in a patch: what it does to activations, besides what it adds to weights, as values.

One per layer and kind; kernels/wrappers.py says what each kind computes. Nothing changes a wrapper after it was made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from gnomon.errors import PatchError
from gnomon.kernels.wrappers import OPTIONAL, SHAPES

NAME = re.compile(r"layers\.(\d+)\.(" + "|".join(SHAPES) + ")")


@dataclass(frozen=True, eq=False)
class Wrapper:
    """kind: neurons, codebook, routed or affine. layer: where. tensors: float32, by the names of the kind."""

    kind: str
    layer: int
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        if self.kind not in SHAPES:
            raise PatchError(f"There is no wrapper of kind `{self.kind}`.", hint=f"Known: {', '.join(SHAPES)}.")
        if self.layer < 0:
            raise PatchError(f"A wrapper's layer is counted from 0, not {self.layer}.")
        object.__setattr__(self, "tensors", MappingProxyType(dict(self.tensors)))
        self.sizes()
        for name, tensor in self.tensors.items():
            if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
                raise PatchError(f"{self.name}: `{name}` must hold finite float32 numbers.")

    @property
    def name(self) -> str:
        return f"layers.{self.layer}.{self.kind}"

    def sizes(self) -> dict[str, int]:
        """The axes' sizes: C, and M, n, r where the kind has them. Raises PatchError where tensors do not agree."""
        axes = {**SHAPES[self.kind], **OPTIONAL.get(self.kind, {})}
        missing = set(SHAPES[self.kind]) - set(self.tensors)
        if missing or set(self.tensors) - set(axes):
            raise PatchError(f"{self.name} holds {sorted(self.tensors)}; the kind has {sorted(axes)}.")
        found: dict[str, int] = {"1": 1}
        for name, tensor in self.tensors.items():
            shape = tuple(tensor.shape)
            if len(shape) != len(axes[name]) or any(
                found.setdefault(a, n) != n for a, n in zip(axes[name], shape, strict=True)
            ):
                raise PatchError(f"{self.name}: `{name}` of shape {shape} does not fit {axes}.")
        return found

    def scaled(self, factor: float) -> Wrapper:
        """The change times a factor. Raises PatchError for kinds that choose instead of adding."""
        if factor == 1.0:
            return self
        if self.kind == "neurons":
            return Wrapper(self.kind, self.layer, {**self.tensors, "value": self.tensors["value"] * factor})
        if self.kind == "affine":
            scaled = {name: self.tensors[name] * factor for name in ("left", "bias")}
            return Wrapper(self.kind, self.layer, {**self.tensors, **scaled})
        raise PatchError(f"{self.name} chooses what a layer says; it cannot be scaled or negated.")


def add(first: Wrapper, second: Wrapper) -> Wrapper:
    """Both at once, of one kind and layer. Codebooks keep apart: where two balls overlap, both shrink to the middle
    (GRACE's split). Raises PatchError for side memories, which each route for themselves.
    """
    a, b = first.tensors, second.tensors
    if first.kind == "routed":
        raise PatchError(
            f"Two patches have a side memory at {first.name}; they do not join.",
            hint="Name both, in order: patches=[a, b].",
        )
    if first.kind == "affine":
        joined = {
            "left": torch.cat([a["left"], b["left"]], 1),
            "right": torch.cat([a["right"], b["right"]]),
            "bias": a["bias"] + b["bias"],
        }
        return Wrapper(first.kind, first.layer, joined)
    if set(a) != set(b):
        raise PatchError(f"{first.name}: gated and plain neurons do not join.", hint="Name both: patches=[a, b].")
    joined = {name: torch.cat([a[name], b[name]]) for name in a}
    if first.kind == "codebook":
        between = torch.cdist(a["key"].double(), b["key"].double()).float()
        overlap = between < a["radius"][:, None] + b["radius"][None]
        half = torch.where(overlap, between / 2, torch.inf)
        joined["radius"] = torch.cat(
            [torch.minimum(a["radius"], half.amin(1)), torch.minimum(b["radius"], half.amin(0))]
        )
    return Wrapper(first.kind, first.layer, joined)


def by_name(name: str, tensors: Mapping[str, Tensor]) -> Wrapper:
    """The wrapper of a file's entry `layers.N.KIND`. Raises PatchError."""
    if (found := NAME.fullmatch(name)) is None:
        raise PatchError(f"`{name}` names no wrapper: layers.N.KIND, where KIND is {', '.join(SHAPES)}.")
    return Wrapper(found[2], int(found[1]), tensors)
