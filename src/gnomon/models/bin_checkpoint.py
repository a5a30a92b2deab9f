"""A model directory with PyTorch `.bin` weights, read only by torch's safe weights-only load.

A pickle that asks for anything but tensors is refused. Everything else is as in DirectoryCheckpoint.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import TYPE_CHECKING

from gnomon.errors import CheckpointError
from gnomon.models import identity
from gnomon.models.held_checkpoint import HeldCheckpoint
from gnomon.models.safetensors_checkpoint import read_chat_template, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.models.tokenizer import Tokenizer


class BinCheckpoint(HeldCheckpoint):
    """config.json + tokenizer files + pytorch_model*.bin (memory-mapped)."""

    def __init__(self, path: Path, reference: str | None = None) -> None:
        self.path = self.folder = path
        self.reference = reference or str(path)
        self.name = path.resolve().name
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.chat_template = read_chat_template(path)
        self.files = sorted(path.glob("pytorch_model*.bin"))
        self._tensors: dict[str, Tensor] = {}
        for file in self.files:
            self._tensors |= load_tensors(file)

    @property
    def identity(self) -> str:
        return identity.cached(self.files, self._compute_identity)

    def _compute_identity(self) -> str:
        infos = [self.info(name) for name in self._tensors]
        return identity.of_tensors(
            (info.name, info.dtype, info.shape, identity.tensor_digest(self._tensors[info.name])) for info in infos
        )

    def tokenizer(self) -> Tokenizer:
        from gnomon.models.tokenizer import Tokenizer

        return Tokenizer.from_directory(self.folder)

    def close(self) -> None:
        self._tensors = {}


def load_tensors(file: Path) -> dict[str, Tensor]:
    """A pickle's tensors, memory-mapped. Raises CheckpointError for one that asks for more than tensors."""
    import torch

    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r"GLOBAL ([\w.]+)", str(error))
        raise CheckpointError(
            f"{file} asks for more than tensors{f' ({wanted[1]})' if wanted else ''} and was not loaded.",
            hint="A pickle can run code. Ask its author for safetensors.",
        ) from None
    except (RuntimeError, OSError, EOFError) as error:
        raise CheckpointError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise CheckpointError(f"{file} is not a flat table of tensors.")
    return content
