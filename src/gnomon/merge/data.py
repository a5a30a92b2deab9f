"""Texts that methods look at, and how many of their tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Data:
    """One text."""

    text: str
    tokens: int

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.tokens}\0{self.text}".encode()).hexdigest()


@dataclass(frozen=True)
class Texts:
    """Each model's own text, or the one for all of them."""

    common: Data | None
    own: Mapping[str, Data]

    def of(self, model: str) -> Data | None:
        return self.own.get(model, self.common)

    def all(self) -> list[Data]:
        """Every different text, the common one first."""
        return list(dict.fromkeys([*([self.common] if self.common else []), *self.own.values()]))

    def digest(self, identities: Mapping[str, str]) -> list[object]:
        own = sorted((identities[model], data.digest) for model, data in self.own.items())
        return [self.common.digest if self.common else None, own]
