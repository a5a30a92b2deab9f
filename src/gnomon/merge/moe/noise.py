"""A checkpoint with normal noise on its MLPs: experts of one model that training can pull apart.

Counter-based: the noise of an element depends on the seed, the expert, the tensor and the element alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from gnomon.merge.randomness import CounterRandomness
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.tokenizer import Tokenizer


class NoisyCheckpoint(Checkpoint):
    """deviation: of the noise, in the weights' own unit. number: the expert's, so that two of one model differ."""

    def __init__(self, of: Checkpoint, deviation: float, seed: int, number: int) -> None:
        self._of = of
        self._deviation = deviation
        self._random = CounterRandomness(seed)
        self._number = number
        self.reference = self.name = of.reference
        self.path = None
        self.config, self.generation_config, self.chat_template = of.config, of.generation_config, of.chat_template

    def info(self, name: str) -> TensorInfo:
        info = self._of.info(name)
        return TensorInfo(name, info.shape, "float32")

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        own = self._of.reader(name)
        return lambda start, stop: own(start, stop).float() + self._noise(name, start, stop - start)

    def __getitem__(self, name: str) -> Tensor:
        shape = self.info(name).shape
        return self.reader(name)(0, torch.Size(shape).numel()).reshape(shape)

    def _noise(self, name: str, start: int, count: int) -> Tensor:
        """Box and Muller's two uniform numbers for a normal one."""
        first, second = (
            (self._random.words(name, 2 * self._number + half, start, count).astype(np.float64) + 0.5) * 2.0**-32
            for half in (0, 1)
        )
        normal = np.sqrt(-2.0 * np.log(first)) * np.cos(2.0 * np.pi * second)
        return torch.from_numpy(normal * self._deviation).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def __len__(self) -> int:
        return len(self._of)

    @property
    def identity(self) -> str:
        facts = {"deviation": self._deviation, "seed": self._random.seed, "number": self._number}
        return identity.derived("noise", facts, [self._of.identity])

    def tokenizer(self) -> Tokenizer:
        return self._of.tokenizer()
