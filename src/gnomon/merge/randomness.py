"""Random numbers that do not depend on order: a draw is a function of (seed, tensor, model, element).

Native: NumPy's Philox4x64-10 (counter-based, its stream is frozen by NumPy's policy), keyed by a hash of seed, tensor
name and model ordinal; element e takes the e-th 32-bit word. Compatible: torch's CPU generator, consumed in the order
in which mergekit consumes it, for side-by-side equality.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

WORDS_PER_STEP = 8
"""32-bit words that one step of the counter gives."""


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
        words = self.words(name, model, start, shape.numel())
        if isinstance(probability, Tensor):
            # u = (word + 0.5) / 2**32 in float64: exact, and strictly inside (0, 1)
            uniform = (torch.from_numpy(words.astype(np.float64)) + 0.5) * 2.0**-32
            return (uniform < probability.reshape(-1).double()).reshape(shape)
        below = np.less(words, np.uint64(self.below(probability)))
        return torch.from_numpy(below).reshape(shape)


class TorchRandomness:
    """torch's generator, for compat: methods draw from it themselves (compat.py), in mergekit's order."""

    def __init__(self, seed: int | None = None) -> None:
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed)


Randomness = CounterRandomness | TorchRandomness
