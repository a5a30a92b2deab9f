"""Drawing from the model's own distribution, given that the text is valid; masks alone draw from another one.

A mask gives the probability of what is forbidden to what is allowed at the same place, whatever may come of it later,
so a text is drawn by the product of such quotients and not by its own probability (Park et al., "Grammar-Aligned
Decoding", arXiv 2405.21047). Here a text is drawn until one is valid, and what was learnt of beginnings keeps later
draws from failing in the same way: rejection that adapts, and stays exact at every draw.

Every beginning that was seen has an upper bound on the probability that it becomes a valid text: 1 before it was seen,
then the mass of what the mask allows, then the sum over the next tokens of probability times bound. At a beginning seen
before, tokens are drawn by probability times bound; at a new one by probability alone, and if a forbidden one comes,
all begins anew. The bounds cancel along a text: each attempt gives a valid text x with probability p(x) / bound(root).
Knows probabilities and token ids. Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

MOST_ATTEMPTS = 300
"""Failed attempts at one text, after which it is drawn by the mask alone, with a warning."""

LEAST = 1e-12
"""A bound below this is what rounding left of none."""


class Beginning:
    """A beginning that was seen. share: its last token's probability after the rest; bound: on a valid end."""

    __slots__ = ("bound", "following", "parent", "seen", "share")

    def __init__(self, parent: Beginning | None = None, share: float = 1.0) -> None:
        self.parent = parent
        self.share = share
        self.bound = 1.0
        self.seen = False
        self.following: dict[int, Beginning] = {}

    def lower(self, bound: float) -> None:
        """No more than this; what lies before learns of it."""
        place: Beginning | None = self
        less = self.bound - bound
        while place is not None:
            left = place.bound - less
            left = left if left > LEAST else 0.0
            less, place.bound = (place.bound - left) * place.share, left
            place = place.parent

    def bounds(self) -> Mapping[int, float]:
        """Of the tokens that may follow, those whose bound is below 1."""
        return {token: after.bound for token, after in self.following.items() if after.bound < 1}


class Attempts:
    """All draws of one text. here: the beginning that stands now."""

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.root = self.here = Beginning()
        self.failed = 0
        self._shares_V: NDArray[np.float64] = np.zeros(0)

    @property
    def hopeless(self) -> bool:
        return self.failed > MOST_ATTEMPTS or self.root.bound <= 0

    def weigh(self, row_V: NDArray[np.float32], allowed_V: NDArray[np.bool_]) -> None:
        """Change logits so that drawing from them at this temperature is the next step of an attempt."""
        scaled_V = row_V.astype(np.float64) / self.temperature
        scaled_V -= scaled_V.max()
        np.exp(scaled_V, out=scaled_V)
        self._shares_V = scaled_V / scaled_V.sum()
        if not self.here.seen:  # as the model has it: whether what comes is allowed decides over the attempt
            self.here.seen = True
            self.here.lower(float(self._shares_V[allowed_V].sum()))
            return
        row_V[~allowed_V] = -np.inf
        for token, bound in self.here.bounds().items():
            row_V[token] += self.temperature * np.log(bound) if bound > 0 else -np.inf

    def took(self, token: int) -> None:
        """This token was drawn."""
        if token not in self.here.following:
            self.here.following[token] = Beginning(self.here, float(self._shares_V[token]))
        self.here = self.here.following[token]

    def fail(self, *, dead: bool) -> None:
        """Begin anew. dead: nothing valid comes of what was drawn last, as was not known before."""
        self.failed += 1
        if dead:
            self.here.lower(0.0)
        self.here = self.root
