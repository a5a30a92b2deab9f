"""What a member thinks of every byte of a known text, and bits per byte.

The text's own tokens are computed in one pass, as for perplexity. The lattice also asks for other spellings, mostly the
tokeniser's own for a text that ends inside the next token: those are computed ahead, many in one pass, on forks of the
pages. Rows do not depend on what else is in a pass, so that changes no bit. Runs on whatever thread owns the member.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from gnomon.ensemble.lattice import STOP, Lattice, whole_characters
from gnomon.ensemble.member import Member
from gnomon.ensemble.retokenize import GrowingText
from gnomon.ensemble.trie import Floats
from gnomon.errors import ContextLengthExceeded, OutOfMemory, UnsupportedModel
from gnomon.kernels.batch import PAGE, Span

log = logging.getLogger("gnomon.ensemble")
CHUNK = 32
"""Tokens computed at once: the rows of logits of two chunks are in memory together."""
AHEAD = 32
"""Bytes for whose spellings branches are computed ahead, in one pass."""
SEQUENCE = -2


class Trunk:
    """Logits after any beginning of one token sequence that is not shorter than its context, and after short branches.

    ids: the context (`context` of them) and the text.
    """

    def __init__(self, member: Member, ids: Sequence[int], context: int) -> None:
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
        self.branches: dict[tuple[int, ...], Tensor] = {}
        self.pages = self._allocate(-(-len(ids) // PAGE))
        self._feed(context - 1)

    def close(self) -> None:
        self.member.pool.release(self.pages)
        self.member.runner.release(SEQUENCE)
        self.pages = []

    def prepare(self, texts: Iterable[Sequence[int]]) -> None:
        """Compute the branches among these texts in one pass; what was prepared before is forgotten."""
        self.branches = {}
        wanted = {tuple(ids) for ids in texts}
        branches = [(ids, common) for ids in sorted(wanted) if (common := self._common(ids)) < len(ids)]
        if not branches:
            return
        self._compute(max(common for _, common in branches))
        spans, own = [], []
        try:
            for place, (ids, common) in enumerate(branches):
                pages = self._fork(ids, common)
                own += pages
                spans.append(self._span(place, ids, common, pages))
            for (ids, _), rows in zip(branches, self.member.runner.step(spans), strict=True):
                self.branches[ids] = rows[-1]
        except OutOfMemory:
            log.debug("No pages to compute branches ahead: they follow one by one.")
        finally:
            self.member.pool.release(own)

    def logits(self, ids: Sequence[int]) -> Tensor:
        """[V] after these tokens."""
        key = tuple(ids)
        if key in self.branches:
            return self.branches[key]
        common = self._common(key)
        self._compute(common)
        if common == len(key):
            return self.rows[common]
        own = self._fork(key, common)
        try:
            (rows,) = self.member.runner.step([self._span(0, key, common, own)])
            return rows[-1]
        finally:
            self.member.pool.release(own)

    def _common(self, ids: Sequence[int]) -> int:
        shorter = min(len(self.ids), len(ids))
        return next((i for i in range(shorter) if self.ids[i] != ids[i]), shorter)

    def _feed(self, length: int) -> None:
        """Tokens after which nobody asks for logits."""
        while self.computed < length:
            chunk = self.ids[self.computed : min(self.computed + 4 * CHUNK, length)]
            self.member.runner.step([Span(SEQUENCE, chunk, self.computed, self.pages, "none", self.member.sides)])
            self.computed += len(chunk)

    def _compute(self, length: int) -> None:
        """Bring the trunk to `length` tokens; rows older than the chunk before are forgotten."""
        while self.computed < length:
            chunk = self.ids[self.computed : self.computed + CHUNK]
            span = Span(SEQUENCE, chunk, self.computed, self.pages, "all", self.member.sides)
            (rows,) = self.member.runner.step([span])
            self.rows = {end: row for end, row in self.rows.items() if end > self.computed - CHUNK}
            self.rows |= {self.computed + 1 + place: row for place, row in enumerate(rows)}
            self.computed += len(chunk)

    def _fork(self, ids: Sequence[int], common: int) -> list[int]:
        """Pages of a branch's own: the rest of the page in which it leaves the trunk, and what follows."""
        shared = common // PAGE
        own = self._allocate(-(-len(ids) // PAGE) - shared)
        if common % PAGE:
            for keys, values in self.member.runner.pages:
                keys[own[0]], values[own[0]] = keys[self.pages[shared]], values[self.pages[shared]]
        return own

    def _span(self, place: int, ids: Sequence[int], common: int, own: list[int]) -> Span:
        pages = self.pages[: common // PAGE] + own
        return Span(SEQUENCE - 1 - place, list(ids[common:]), common, pages, "last", self.member.sides)

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
    trunk = Trunk(member, context + member.retokenizer.ids(data), len(context))
    growing = GrowingText(member.retokenizer)
    found = np.empty(len(data) + 1)
    try:
        for place in range(len(data) + 1):
            if place % AHEAD == 0:
                ends = (end for end in range(place, min(place + AHEAD, len(data) + 1)) if whole_characters(data[:end]))
                trunk.prepare([*context, *growing.update(data[:end])] for end in ends)
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
