"""A member's vocabulary as a trie in arrays: sorted by bytes, a prefix is an interval and its mass a difference.

One pass over the logits gives cumulative masses; after that the 256 next bytes of any prefix cost two binary searches'
worth of work, whatever the vocabulary's size. Control tokens have no bytes; end tokens are the STOP mass.
Legend: V tokens with bytes, in byte order; D depth (bytes).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

EDGES = np.arange(257)
Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Masses:
    """One distribution over a vocabulary: cumulative_V1[j] - cumulative_V1[i] is the mass of tokens i..j-1."""

    cumulative_V1: Floats
    stop: float


class ByteTrie:
    """The sorted vocabulary. texts: bytes of each token id, b"" for one that has none."""

    def __init__(self, texts: Sequence[bytes], stops: Collection[int]) -> None:
        ids = sorted((i for i, text in enumerate(texts) if text and i not in stops), key=lambda i: (texts[i], i))
        self.texts = texts
        self.ids_V: Ints = np.array(ids, dtype=np.int64)
        self.stops: Ints = np.array(sorted(stops), dtype=np.int64)
        self.lengths_V = np.array([len(texts[i]) for i in ids], dtype=np.int64)
        self.deepest = int(self.lengths_V.max(initial=1))
        flat = np.frombuffer(b"".join(texts[i].ljust(self.deepest, b"\0") for i in ids), dtype=np.uint8)
        self.columns_DV = np.ascontiguousarray(flat.reshape(len(ids), self.deepest).T)
        self._root_edges = np.searchsorted(self.columns_DV[0], EDGES)

    @property
    def whole(self) -> tuple[int, int]:
        """The interval of the empty prefix."""
        return 0, len(self.ids_V)

    def masses(self, logits: NDArray[np.float32]) -> Masses:
        """The distribution among tokens with bytes and STOP; everything else is masked."""
        chosen = logits[self.ids_V]
        ends = logits[self.stops].astype(np.float64)
        greatest = max(float(chosen.max()), float(ends.max(initial=-np.inf)))
        cumulative = np.empty(len(chosen) + 1)
        cumulative[0] = 0.0
        np.cumsum(np.exp(chosen - np.float32(greatest)), dtype=np.float64, out=cumulative[1:])
        stop = float(np.exp(ends - greatest).sum())
        total = float(cumulative[-1]) + stop
        cumulative /= total
        return Masses(cumulative, stop / total)

    def exact(self, low: int, high: int, depth: int) -> int:
        """Where the tokens of the interval that are longer than its prefix begin; those before it equal the prefix."""
        while low < high and self.lengths_V[low] == depth:
            low += 1
        return low

    def child(self, low: int, high: int, depth: int, byte: int) -> tuple[int, int]:
        """The interval of a prefix one byte longer."""
        low = self.exact(low, high, depth)
        if low >= high or depth >= self.deepest:
            return low, low
        column = self.columns_DV[depth][low:high]
        return low + int(np.searchsorted(column, byte)), low + int(np.searchsorted(column, byte, side="right"))

    def next_bytes(self, masses: Masses, low: int, high: int, depth: int) -> Floats:
        """The mass of each next byte below an interval -> [256]."""
        low = self.exact(low, high, depth)
        if low >= high or depth >= self.deepest:
            return np.zeros(256)
        if depth == 0 and (low, high) == self.whole:
            edges = self._root_edges
        else:
            edges = low + np.searchsorted(self.columns_DV[depth][low:high], EDGES)
        return np.diff(masses.cumulative_V1[edges])
