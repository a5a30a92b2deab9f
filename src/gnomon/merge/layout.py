"""Which layer a tensor belongs to, told from its name alone: no description of the architecture is needed.

`model.layers.3.mlp.up_proj.weight` is layer 3 of the stack `model.layers`; tensors outside of all stacks come before
the layers (embeddings) or after them (final norm, head).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

NUMBERED = re.compile(r"^(.*?)\.(\d+)\.(.+)$")
BUFFERS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "position_ids")
"""Buffers that some files hold and others do not; a network computes them itself."""
TABLES = ("embed_tokens", "lm_head", "wte", "embed_in", "embed_out", "word_embeddings", "shared", "tok_embeddings")
HEADS = {"lm_head.weight": "model.embed_tokens.weight", "embed_out.weight": "gpt_neox.embed_in.weight"}


@dataclass(frozen=True)
class Place:
    """stack: the layers' common prefix ("" outside of all), layer: its index, rest: the name within the layer."""

    stack: str
    layer: int
    rest: str


@dataclass(frozen=True)
class Layout:
    """One model's tensors by place."""

    places: Mapping[str, Place]
    stacks: Mapping[str, int]

    @classmethod
    def of(cls, names: Iterable[str]) -> Layout:
        found = {}
        for name in names:
            match = NUMBERED.match(name)
            found[name] = Place(match[1], int(match[2]), match[3]) if match else Place("", 0, name)
        stacks: dict[str, int] = {}
        for place in found.values():
            if place.stack:
                stacks[place.stack] = max(stacks.get(place.stack, 0), place.layer + 1)
        return cls(found, stacks)

    def main_stack(self) -> str | None:
        """The stack with the most tensors; None for a network without layers."""
        counts = Counter(place.stack for place in self.places.values() if place.stack)
        return counts.most_common(1)[0][0] if counts else None

    def position(self, name: str) -> float:
        """t of a tensor in 0..1: its layer over the stack; 1 in a stack of one layer, 0 outside of all."""
        place = self.places[name]
        return layer_position(place.layer, self.stacks[place.stack]) if place.stack else 0.0


def layer_position(layer: int, count: int) -> float:
    return layer / (count - 1) if count > 1 else 1.0


def is_before_layers(name: str) -> bool:
    """Embeddings come before the layers; whatever else stands outside of them comes after."""
    return "embed" in name.rsplit(".", 1)[0].replace("embed_out", "") or ".wte." in name or ".wpe." in name


def is_vocabulary_table(name: str, shape: tuple[int, ...], vocabulary: int | None) -> bool:
    """Whether a tensor's rows stand for tokens."""
    return bool(shape) and vocabulary is not None and shape[0] == vocabulary and any(t in name for t in TABLES)


def is_buffer(name: str) -> bool:
    return name.endswith(BUFFERS)
