"""Random numbers that do not depend on order: a draw is a function of (seed, tensor, model, element).

Native: NumPy's Philox4x64-10 (counter-based, its stream is frozen by NumPy's policy), keyed by a hash of seed, tensor
name and model ordinal; element e takes the e-th 32-bit word. Compatible: torch's CPU generator, consumed in the order
in which mergekit consumes it, for side-by-side equality.
"""

from __future__ import annotations

import hashlib
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

WORDS_PER_STEP = 8
"""32-bit words that one step of the counter gives."""


class Randomness(Protocol):
    whole: bool
    """Whether draws must be made for a whole tensor at once."""

    def keep(self, name: str, model: int, start: int, probability: float | Tensor, shape: torch.Size) -> Tensor:
        """Bernoulli draws (True: keep) for elements start.. of a tensor; probability: one, or one per element."""


class CounterRandomness:
    """The native source."""

    whole = False

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
        words = self.words(name, model, start, shape.numel())
        if isinstance(probability, Tensor):
            # u = (word + 0.5) / 2**32 in float64: exact, and strictly inside (0, 1)
            uniform = (torch.from_numpy(words.astype(np.float64)) + 0.5) * 2.0**-32
            return (uniform < probability.reshape(-1).double()).reshape(shape)
        below = np.less(words, np.uint64(self.below(probability)))
        return torch.from_numpy(below).reshape(shape)


class TorchRandomness:
    """torch.bernoulli from one generator, a whole tensor at a time, in the order of calls."""

    whole = True

    def __init__(self, seed: int | None = None) -> None:
        self.generator = torch.Generator()
        if seed is not None:
            self.generator.manual_seed(seed)
        self._drawn: dict[tuple[str, int], Tensor] = {}

    def draw(self, name: str, model: int, probability: Tensor) -> None:
        """Draw for a whole tensor: consumes the generator."""
        self._drawn[name, model] = torch.bernoulli(probability, generator=self.generator).bool().reshape(-1)

    def keep(self, name: str, model: int, start: int, probability: float | Tensor, shape: torch.Size) -> Tensor:
        return self._drawn[name, model][start : start + shape.numel()].reshape(shape)

    def forget(self, name: str) -> None:
        """Let go of a tensor's draws."""
        self._drawn = {key: value for key, value in self._drawn.items() if key[0] != name}
