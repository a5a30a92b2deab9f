"""A model of which only config.json is there (and perhaps its index): names and shapes, to plan a merge with.

Shapes come from transformers' network built on the meta device, where tensors have no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from gnomon.errors import CheckpointError, MissingExtra
from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.safetensors_checkpoint import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.models.tokenizer import Tokenizer


def is_bare(path: Path) -> bool:
    """Whether a directory has a config and no weights."""
    weights = (*path.glob("*.safetensors"), *path.glob("pytorch_model*.bin"))
    return (path / "config.json").exists() and not weights


class BareCheckpoint(Checkpoint):
    """Raises MissingExtra without transformers, CheckpointError for a network that it does not know."""

    def __init__(self, path: Path) -> None:
        try:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM
        except ImportError:
            raise MissingExtra("Planning without weights", "transformers") from None
        self.path = path
        self.reference = self.name = str(path)
        self.config = read_json(path / "config.json")
        self.generation_config = {}
        self.chat_template = None
        dtype = str(self.config.get("dtype") or self.config.get("torch_dtype") or "bfloat16")
        try:
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, local_files_only=True))
        except (ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: {str(error).splitlines()[0]}") from None
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
        if self.config.get("tie_word_embeddings"):
            shapes.pop("lm_head.weight", None)
        self._infos = {name: TensorInfo(name, shape, dtype) for name, shape in shapes.items()}

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def __getitem__(self, name: str) -> Tensor:
        raise CheckpointError(f"{self.reference} has no weights here: it can be planned with, not merged.")

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        raise CheckpointError(f"{self.reference} has no weights here: it can be planned with, not merged.")

    def __iter__(self) -> Iterator[str]:
        return iter(self._infos)

    def __len__(self) -> int:
        return len(self._infos)

    @property
    def identity(self) -> str:
        raise CheckpointError(f"{self.reference} has no weights here, so it has no identity.")

    def tokenizer(self) -> Tokenizer:
        raise CheckpointError(f"{self.reference} has no tokenizer here.")
