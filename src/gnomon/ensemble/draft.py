"""A draft of `when: safe`: where the primary would go next, and what the others think of it (see safe.py)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from gnomon.ensemble.union import Voice

SURE = 0.5
"""Of a probability: at or above it the primary, or the primary and a judge on average, are sure."""


@dataclass
class Draft:
    """The primary's way from `start` (symbols before it) on. voices: the primary's, per place.

    verdicts: what each judge says per place, None without a token boundary there. heard: per place the others' voices
    where it is to be fused, once it is judged.
    """

    start: int
    base: list[int]
    symbols: list[int] = field(default_factory=list)
    voices: list[Voice] = field(default_factory=list)
    verdicts: dict[int, list[Voice | None]] = field(default_factory=dict)
    heard: list[dict[int, Voice]] = field(default_factory=list)
    judged: bool = False

    def covers(self, symbols: Sequence[int]) -> bool:
        """Whether what this draft says of its places holds for a text that has come so far."""
        ahead = len(symbols) - self.start
        return (
            0 <= ahead < len(self.voices)
            and list(symbols[: self.start]) == self.base
            and list(symbols[self.start :]) == self.symbols[:ahead]
        )

    @property
    def unsure(self) -> list[int]:
        """Places at which others are heard."""
        return [place for place, voice in enumerate(self.voices) if voice.best < SURE]

    def close(self) -> None:
        """All judges have spoken: what they said counts only where a place is to be fused."""
        self.heard = [self._objection(place) for place in range(len(self.voices))]
        self.verdicts, self.judged = {}, True

    def _objection(self, place: int) -> dict[int, Voice]:
        """The others' voices at a place that is to be fused; none where the primary's word stands."""
        if self.voices[place].best >= SURE:
            return {}
        heard = {m: v for m, voices in self.verdicts.items() if (v := voices[place]) is not None}
        symbol, best = self.symbols[place], self.voices[place].best
        objects = any(
            (best + math.exp(voice.at([symbol])[0])) / 2 < SURE and favourite(voice) != symbol
            for voice in heard.values()
        )
        return heard if objects else {}


def favourite(voice: Voice) -> int:
    """The symbol of a voice's likeliest token that has one; STOP for an end token."""
    best = int(voice.probabilities_V.argmax())
    if (symbol := int(voice.mapped.symbol_V[best])) >= 0:
        return symbol
    return int(voice.mapped.symbol_V[np.where(voice.mapped.symbol_V >= 0, voice.probabilities_V, -1.0).argmax()])
