"""Drafts for speculative decoding: guesses of the next tokens, which the model then confirms or not in one step.

Accepted is only what the request's own seeded draw gives: the output is that of decoding without drafts, bit for bit.
(Prompt lookup decoding; speculative decoding, arXiv 2211.17192, with the equality of draws in place of its test.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

LONGEST = 16
"""Most tokens of one draft."""
Choose = Callable[["Tensor", int], int]
"""(logits_V, how many tokens after the next one) -> the token that the sequence's own noise would draw from them."""


class Drafter(Protocol):
    """One sequence's guesser."""

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        """At most `most` tokens that may follow."""

    def close(self) -> None:
        """The sequence is over."""


def certain(stages: Iterable[object], most: int) -> list[int]:
    """Tokens that a logits stage will force (its optional `forced()`): the draw confirms them like any guess."""
    for stage in stages:
        if (forced := getattr(stage, "forced", None)) is not None and (tokens := forced()):
            return list(tokens)[:most]
    return []


class PromptLookup:
    """What followed the last time these tokens stood here (prompt lookup decoding; n-grams of 3, then 2).

    Each length's table maps an n-gram to the place after its latest occurrence before the end.
    """

    GRAMS = (3, 2)

    def __init__(self) -> None:
        self._seen: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        self._learn(tokens)
        for n in self.GRAMS:
            place = self._after.get(tuple(tokens[-n:]))
            if place is not None and len(tokens) > n:
                followed = tokens[place:]
                return (followed * (most // len(followed) + 1))[:most]  # a loop goes on
        return []

    def close(self) -> None:
        """Nothing to free."""

    def _learn(self, tokens: list[int]) -> None:
        """N-grams that end before the last token; a text that was rolled back is read again."""
        known = len(self._seen)
        if tokens[:known] != self._seen:
            self._after.clear()
            known = 0
        for end in range(max(known, 1), len(tokens)):
            for n in self.GRAMS:
                if end >= n:
                    self._after[tuple(tokens[end - n : end])] = end
        self._seen = list(tokens)


class AdaptiveLength:
    """How long the next draft may be: doubled when a draft was accepted whole, halved when none of it was.

    A guesser that keeps failing is asked ever more rarely, until it is right again.
    """

    LONGEST_PAUSE = 64

    def __init__(self, start: int = 4) -> None:
        self.length = start
        self._pause = 1
        self._silent = 0

    def next(self) -> int:
        """Tokens that may be guessed now; to be asked once before each step."""
        if self._silent:
            self._silent -= 1
            return 0
        return self.length

    def learn(self, drafted: int, accepted: int) -> None:
        if accepted:
            self._pause = 1
        if accepted == drafted:
            self.length = min(LONGEST, 2 * self.length)
        elif accepted == 0 and self.length > 1:
            self.length //= 2
        elif accepted == 0:
            self._silent = self._pause
            self._pause = min(self.LONGEST_PAUSE, 2 * self._pause)
