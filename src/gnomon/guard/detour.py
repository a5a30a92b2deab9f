"""A way around: where the guard took an answer back, the token that led there is hardly drawn again.

Knows token ids and places only; the guard's stage of the same answer says when a rollback was its own.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

FAR = 1e9
"""Taken from the logit: a token that a mask leaves as the only one can still be drawn."""


class Detour:
    """One answer's banned tokens, by their place."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.banned: dict[int, set[int]] = {}
        self.armed = False

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        for token in self.banned.get(len(generated), ()):
            logits_V[token] -= FAR
        return logits_V

    def accept(self, token_id: int) -> None:
        self.tokens.append(token_id)

    def rollback(self, count: int) -> None:
        place = len(self.tokens) - count
        taken, self.tokens = self.tokens[place], self.tokens[:place]
        self.banned = {at: ids for at, ids in self.banned.items() if at <= place}
        if self.armed:
            self.banned.setdefault(place, set()).add(taken)
            self.armed = False

    def copy(self) -> Detour:
        twin = Detour()
        twin.tokens, twin.armed = list(self.tokens), self.armed
        twin.banned = {place: set(ids) for place, ids in self.banned.items()}
        return twin
