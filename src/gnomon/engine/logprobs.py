"""Log-probabilities: of a token, and of the best alternatives.

Taken from the request's logits after fusion and before penalties, bias, masks, temperature and filters. Lists are in
order of value, the lower token id first among equals. One float64 definition serves generated tokens and the prompt's
own, so a text scored again gives the same bits.
Legend: V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gnomon.engine.elementary import logsumexp

Row = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Logprobs:
    """The log-probabilities of one row, with the best `count` alternatives."""

    row_V: Row
    normaliser: float
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, row_V: NDArray[np.float32], count: int) -> Logprobs:
        """row_V is kept, not copied: give it a row that nobody edits afterwards."""
        normaliser = logsumexp(row_V.astype(np.float64))
        best = largest(row_V, count)
        return cls(row_V, normaliser, tuple((int(i), float(row_V[i]) - normaliser) for i in best))

    def of_token(self, token_id: int) -> float:
        return float(self.row_V[token_id]) - self.normaliser


def largest(row_V: Row, count: int) -> NDArray[np.int64]:
    """Token ids of the `count` greatest values, by value descending, then id ascending: a stable sort's prefix."""
    size = len(row_V)
    if count <= 0:
        return np.empty(0, dtype=np.int64)
    if count >= size:
        return np.argsort(-row_V, kind="stable")
    least = np.partition(row_V, size - count)[size - count]
    candidates = np.flatnonzero(row_V >= least)  # ties at the edge included, ids ascending
    return candidates[np.argsort(-row_V[candidates], kind="stable")][:count]
