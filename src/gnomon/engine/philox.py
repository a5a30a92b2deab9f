"""Seeded noise by counter: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011).

Nothing is consumed: the draw of a token is a pure function of (seed, choice, output position, rollbacks so far, token
id), so batch, neighbours, preemption and speculation cannot shift it. The 64-bit key is the seed; the counter's four
words are (token id div 4, position, choice, rollbacks), and token id mod 4 picks one of its four outputs: no two
draws share a word, and one block serves four tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gnomon.engine.elementary import Array, log

Words = NDArray[np.uint64]

ROUNDS = 10
MASK = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[int, int]) -> tuple[Words, Words, Words, Words]:
    """The four 32-bit outputs for each counter (broadcast together), held in uint64."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ np.uint64(k0), p1 & MASK, (p0 >> HALF) ^ c3 ^ np.uint64(k1), p0 & MASK
        k0, k1 = (k0 + WEYL[0]) & 0xFFFFFFFF, (k1 + WEYL[1]) & 0xFFFFFFFF
    return c0, c1, c2, c3


def uniform(draws: Words) -> Array:
    """32-bit draws to (r + 0.5) * 2**-32: exact in float64 and strictly inside (0, 1), whatever r."""
    return (draws.astype(np.float64) + 0.5) * 2.0**-32


def gumbel(u: Array) -> Array:
    """-log(-log u): add it to logits, take the greatest, and you have sampled from their softmax."""
    return -log(-log(u))


@dataclass(frozen=True)
class Noise:
    """The draws of one output position of one choice."""

    seed: int
    stream: int
    position: int
    rollbacks: int = 0

    def draws(self, token_ids: NDArray[np.int64]) -> Words:
        """The draw of each of these tokens, in their order -> [n]."""
        blocks = self._blocks(token_ids.astype(np.uint64) >> np.uint64(2))
        return np.choose(token_ids & 3, blocks)

    def all_draws(self, vocab_size: int) -> Words:
        """The draws of tokens 0..vocab_size - 1, bit-equal to `draws` of each."""
        blocks = self._blocks(np.arange((vocab_size + 3) // 4, dtype=np.uint64))
        return np.stack(blocks, axis=1).reshape(-1)[:vocab_size]

    def _blocks(self, first_words: Words) -> tuple[Words, Words, Words, Words]:
        counter = (first_words, _word(self.position), _word(self.stream), _word(self.rollbacks))
        return philox(counter, (self.seed & 0xFFFFFFFF, self.seed >> 32))


def _word(value: int) -> Words:
    return np.array([value], dtype=np.uint64)
