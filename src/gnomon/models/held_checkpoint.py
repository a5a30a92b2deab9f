"""Tensors in memory as a checkpoint: what a command has computed, or what a file gave whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from gnomon.errors import CheckpointError
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.models.tokenizer import Tokenizer


class HeldCheckpoint(Checkpoint):
    """Its identity is that of its bytes."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        self.reference = self.name = name
        self.path = None
        self.config = {}
        self.generation_config = {}
        self.chat_template = None
        self._tensors = dict(tensors)

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def identity(self) -> str:
        infos = map(self.info, self._tensors)
        return identity.of_tensors((i.name, i.dtype, i.shape, identity.tensor_digest(self[i.name])) for i in infos)

    def tokenizer(self) -> Tokenizer:
        raise CheckpointError(f"{self.reference} has no tokenizer.")
