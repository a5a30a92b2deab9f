"""Random numbers that do not depend on order: a draw is a function of (seed, tensor, model, element).

Native: NumPy's Philox4x64-10 (counter-based, its stream is frozen by NumPy's policy), keyed by a hash of seed, tensor
name and model ordinal. Element e takes the e-th 32-bit word where each element has its own probability; where all have
one, its e-th 16 bits, and only if they leave the draw open 16 more (of the stream's second lane): half the work, and
still exact to 2**-32. Compatible: torch's CPU generator, consumed in the order
in which mergekit consumes it, for side-by-side equality.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

WORDS_PER_STEP = 8
"""32-bit words that one step of the counter gives."""
HALVES_PER_STEP = 16
SECOND_LANE = 1 << 64
"""Steps of the counter that no tensor reaches."""


class CounterRandomness:
    """The native source."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def key(self, name: str, model: int) -> tuple[int, int]:
        """Philox's key for one model's draws of one tensor."""
        digest = hashlib.sha256(f"{self.seed}\0{name}\0{model}".encode()).digest()
        return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")

    @staticmethod
    def below(probability: float) -> int:
        """A draw below this is a success."""
        return min(2**32, max(0, round(probability * 2**32)))

    def words(self, name: str, model: int, start: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
        """The 32-bit draws of elements start .. start + count."""
        key = np.array(self.key(name, model), dtype=np.uint64)
        step, skip = divmod(start, WORDS_PER_STEP)
        raw = np.random.Philox(key=key, counter=step).random_raw((skip + count + 1) // 2)
        return raw.astype("<u8", copy=False).view("<u4")[skip : skip + count]

    def keep(self, name: str, model: int, start: int, probability: float | Tensor, shape: torch.Size) -> Tensor:
        """Bernoulli draws (True: keep) for elements start.. of a tensor; probability: one, or one per element."""
        if isinstance(probability, Tensor):
            # u = (word + 0.5) / 2**32 in float64: exact, and strictly inside (0, 1)
            words = self.words(name, model, start, shape.numel())
            uniform = (torch.from_numpy(words.astype(np.float64)) + 0.5) * 2.0**-32
            return (uniform < probability.reshape(-1).double()).reshape(shape)
        return torch.from_numpy(self.kept(name, model, start, shape.numel(), self.below(probability))).reshape(shape)

    def kept(self, name: str, model: int, start: int, count: int, below: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Which of elements start .. start + count are kept, each with probability below / 2**32."""
        key = np.array(self.key(name, model), dtype=np.uint64)
        step, skip = divmod(start, HALVES_PER_STEP)
        raw = np.random.Philox(key=key, counter=step).random_raw((skip + count + 3) // 4)
        halves = raw.astype("<u8", copy=False).view("<u2")[skip : skip + count]
        high, low = divmod(below, 2**16)
        kept: np.ndarray[Any, np.dtype[np.bool_]] = halves < high
        for place in np.flatnonzero(halves == high):
            more = np.random.Philox(key=key, counter=SECOND_LANE + start + int(place)).random_raw(1)
            kept[place] = int(more[0]) % 2**16 < low
        return kept


class TorchRandomness:
    """torch's generator, for compat: methods draw from it themselves (compat.py), in mergekit's order."""

    def __init__(self, seed: int | None = None) -> None:
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed)


Randomness = CounterRandomness | TorchRandomness
