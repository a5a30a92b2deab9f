"""Checkpoint: a lazy mapping from Hugging Face tensor names to tensors, with config, tokenizer and identity.

It never holds more than it was asked for. A merge or a LoRA overlay is a Checkpoint whose tensors are computed on
demand. Knows files and formats, nothing of networks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.kernels.operators import QuantizedTensor
    from gnomon.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor without reading it. dtype: torch's name ("float32") or a GGUF block type ("Q4_1")."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Checkpoint(Mapping[str, "Tensor"], ABC):
    """Base of all checkpoints.

    reference: as the user named it. name: for display and requests. config: the content of Hugging Face's config.json
    (translated, for GGUF). Tensors come in the file's dtype; GGUF blocks are dequantised to float32.
    """

    reference: str
    name: str
    path: Path | None
    config: dict[str, Any]
    generation_config: dict[str, Any]
    chat_template: str | None

    @abstractmethod
    def info(self, name: str) -> TensorInfo:
        """Shape and dtype without reading the data. Raises KeyError."""

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor: ...

    def __contains__(self, name: object) -> bool:
        """Without reading the tensor, which Mapping's own would."""
        try:
            self.info(name)  # type: ignore[arg-type]
        except KeyError:
            return False
        return True

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def __len__(self) -> int: ...

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """reader(start, stop): elements start..stop of a tensor, flat in row-major order.

        Where the format allows, only those are read and nothing stays mapped; else the tensor is made once and held.
        """
        flat = self[name].reshape(-1)
        return lambda start, stop: flat[start:stop]

    @property
    @abstractmethod
    def identity(self) -> str:
        """sha256 (hex) over the tensors' names, dtypes, shapes and bytes, or over the operation that derives them."""

    @abstractmethod
    def tokenizer(self) -> Tokenizer:
        """A new tokenizer. Raises CheckpointError when the model came without one."""

    @property
    def has_blocks(self) -> bool:
        """Whether there are quantised blocks at all."""
        return False

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's quantised blocks as they lie in the file; None for a plain tensor."""
        return None

    def close(self) -> None:
        """Let go of files and memory maps."""

    def parameters(self) -> int:
        """How many numbers the model has."""
        total = 0
        for name in self:
            count = 1
            for size in self.info(name).shape:
                count *= size
            total += count
        return total


def missing_tensor(checkpoint: Checkpoint, name: str) -> CheckpointError:
    return CheckpointError(
        f"{checkpoint.reference} has no tensor `{name}`.", hint="The file is incomplete, or of another network."
    )
