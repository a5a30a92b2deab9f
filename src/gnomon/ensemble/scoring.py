"""What a member thinks of every byte of a known text, and bits per byte.

The text's own tokens are computed in one pass, as for perplexity; the lattice then asks for few other spellings, whose
logits are computed on a fork of the pages. Runs on whatever thread owns the member.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gnomon.ensemble.lattice import STOP, Lattice
from gnomon.ensemble.member import Member
from gnomon.ensemble.trie import Floats
from gnomon.errors import ContextLengthExceeded, OutOfMemory, UnsupportedModel
from gnomon.kernels.batch import PAGE, Span

CHUNK = 64
"""Tokens computed at once: their rows of logits are in memory together."""
SEQUENCE = -2


class Trunk:
    """Logits after any beginning of one token sequence, and after short branches off it."""

    def __init__(self, member: Member, ids: Sequence[int]) -> None:
        if len(ids) > member.max_context:
            raise ContextLengthExceeded(
                f"The text has {len(ids)} tokens for `{member.name}`; its context holds {member.max_context}.",
                param="text",
            )
        if not member.runner.shares_pages:
            raise UnsupportedModel(f"`{member.name}` keeps caches of its own: its texts cannot be scored byte by byte.")
        self.member = member
        self.ids = list(ids)
        self.computed = 0
        self.rows: dict[int, Tensor] = {}
        self.pages = self._allocate(-(-len(ids) // PAGE))

    def close(self) -> None:
        self.member.pool.release(self.pages)
        self.member.runner.release(SEQUENCE)
        self.pages = []

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[V] after these tokens."""
        common = next((i for i, (a, b) in enumerate(zip(self.ids, ids, strict=False)) if a != b), None)
        if common is None and len(ids) <= len(self.ids):
            self._compute(len(ids))
            return self.rows[len(ids)]
        return self._branch(list(ids), len(self.ids) if common is None else common)

    def _compute(self, length: int) -> None:
        """Bring the trunk to `length` tokens; rows of the chunks before are forgotten."""
        while self.computed < length:
            chunk = self.ids[self.computed : self.computed + CHUNK]
            span = Span(SEQUENCE, chunk, self.computed, self.pages, "all", self.member.sides)
            (rows,) = self.member.runner.step([span])
            self.rows = {self.computed + 1 + place: row for place, row in enumerate(rows)} | (
                {self.computed: self.rows[self.computed]} if self.computed else {}
            )
            self.computed += len(chunk)

    def _branch(self, ids: list[int], common: int) -> Tensor:
        self._compute(common)
        shared = common // PAGE
        own = self._allocate(-(-len(ids) // PAGE) - shared)
        try:
            if common % PAGE:
                for keys, values in self.member.runner.pages:
                    keys[own[0]], values[own[0]] = keys[self.pages[shared]], values[self.pages[shared]]
            span = Span(SEQUENCE - 1, ids[common:], common, self.pages[:shared] + own, "last", self.member.sides)
            (rows,) = self.member.runner.step([span])
            return rows[-1]
        finally:
            self.member.pool.release(own)

    def _allocate(self, count: int) -> list[int]:
        pages: list[int] = []
        for _ in range(count):
            page = self.member.pool.allocate()
            if page is None:
                self.member.pool.release(pages)
                raise OutOfMemory(f"`{self.member.name}` has no pages left for a text of this length.")
            pages.append(page)
        return pages


def byte_probabilities(member: Member, lattice: Lattice, context: list[int], data: bytes) -> Floats:
    """The probability of each byte of `data` after the context's tokens, then of STOP -> [len(data) + 1]."""
    trunk = Trunk(member, context + member.retokenizer.ids(data))
    found = np.empty(len(data) + 1)
    try:
        for place in range(len(data) + 1):
            while (wanted := lattice.wanted()) is not None:
                lattice.give(trunk.logits([*context, *wanted]).numpy())
            distribution = lattice.distribution()
            found[place] = distribution[data[place] if place < len(data) else STOP]
            if place < len(data):
                lattice.push(data[place])
    finally:
        trunk.close()
    return found


def bits(probabilities: Floats) -> float:
    """Bits per byte; infinite when some byte was impossible."""
    if len(probabilities) == 0:
        return 0.0
    with np.errstate(divide="ignore"):
        return float(-np.log2(probabilities).mean())


def mixed(by_member: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Bytes' probabilities under the arithmetic mixture."""
    total = np.zeros_like(by_member[0])
    for probabilities, weight in zip(by_member, weights, strict=True):
        total += weight * probabilities
    return total


def tuned_weights(by_member: Sequence[Floats], rounds: int = 300) -> list[float]:
    """The weights that give these bytes the fewest bits. The objective is concave; each round of EM improves it."""
    share_mn = np.stack([np.maximum(p, 1e-300) for p in by_member])
    weights_m = np.full(len(by_member), 1 / len(by_member))
    for _ in range(rounds):
        joint_mn = weights_m[:, None] * share_mn
        weights_m = (joint_mn / joint_mn.sum(axis=0)).mean(axis=1)
    return [float(w) for w in weights_m / weights_m.sum()]


def fitting_weights(bits_by_member: Sequence[float], sharpness: float) -> list[float]:
    """PackLLM's weights (arXiv 2404.11531): softmax of minus the prompt's log-perplexity, here per byte."""
    scores = -np.log(2) * sharpness * np.array(bits_by_member)
    weights = np.exp(scores - scores.max())
    return [float(w) for w in weights / weights.sum()]
