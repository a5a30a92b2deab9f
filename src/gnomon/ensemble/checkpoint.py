"""The ensemble as a Checkpoint: no tensors of its own, but a name, an identity and the virtual tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from torch import Tensor


class EnsembleCheckpoint(Checkpoint):
    """What `Model` needs to know. identity: sha256 over the members' identities and how they are fused."""

    path: Path | None = None

    def __init__(self, name: str, reference: str, identity: str, tokenizer: Tokenizer, members: Sequence[str]) -> None:
        self.name = name
        self.reference = reference
        self.config: dict[str, Any] = {"ensemble": list(members), "vocab_size": tokenizer.vocab_size}
        self.generation_config: dict[str, Any] = {}
        self.chat_template: str | None = None
        self._identity = identity
        self._tokenizer = tokenizer

    @property
    def identity(self) -> str:
        return self._identity

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def info(self, name: str) -> TensorInfo:
        raise KeyError(name)

    def __getitem__(self, name: str) -> Tensor:
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(())

    def __len__(self) -> int:
        return 0
