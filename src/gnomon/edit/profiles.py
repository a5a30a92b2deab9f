"""Profiles: at which layer a model's facts are best edited, found by probing.

Shipped where a model was probed (`profiles.toml`); another one is edited at a quarter of its depth until told
otherwise. Causal tracing does not predict the best layer (arXiv 2301.04213), so probing decides.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from gnomon.edit.moments import TOKENS

if TYPE_CHECKING:
    from gnomon.edit.anatomy import Anatomy
    from gnomon.model import Model

DEPTH = 0.25
"""Where an unmeasured model is edited, as a share of its depth."""
SPREAD = 4
"""How many neighbouring layers a method that edits several takes in an unmeasured model."""


@dataclass(frozen=True)
class Profile:
    """layer: for methods that edit one. several: for those that spread a change. options: per method.

    tokens: of the text whose moments were used when the profile was measured.
    """

    name: str
    layer: int
    several: tuple[int, ...]
    measured: bool
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tokens: int = TOKENS

    def layers(self, method: str) -> list[int]:
        own = self.options.get(method, {}).get("layers")
        if own is not None:
            return list(own)
        return list(self.several) if method in SPREADING else [self.layer]

    def defaults(self, method: str) -> dict[str, Any]:
        """This model's own option defaults for a method."""
        return {key: value for key, value in self.options.get(method, {}).items() if key != "layers"}


SPREADING = ("memit", "pmet", "alphaedit", "encore", "rect", "prune")


def shape_name(config: Mapping[str, Any], anatomy: Anatomy) -> str:
    """A network's kind and size, by which fine-tuned relatives of a measured model find its profile."""
    return f"{config.get('model_type', '?')}-{anatomy.hidden}x{len(anatomy.layers)}"


def of(model: Model, anatomy: Anatomy) -> Profile:
    """The shipped profile of this kind and size of network, or a guess by depth."""
    name = shape_name(model.checkpoint.config, anatomy)
    shipped = tomllib.loads((files("gnomon.edit") / "profiles.toml").read_text("utf-8"))
    if name in shipped:
        own = shipped[name]
        options = {key: value for key, value in own.items() if isinstance(value, dict)}
        return Profile(name, own["layer"], tuple(own["several"]), True, options, own.get("tokens", TOKENS))
    layer = round(DEPTH * len(anatomy.layers))
    several = tuple(range(max(0, layer - SPREAD + 1), layer + 1))
    return Profile(name, layer, several, False)
