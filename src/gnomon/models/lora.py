"""A PEFT LoRA adapter laid over a checkpoint: W + scale * B A, computed when it is asked for (arXiv 2106.09685)."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import CheckpointError, UnsupportedModel
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.low_rank import product
from gnomon.models.safetensors_checkpoint import read_header, read_json

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.models.tokenizer import Tokenizer

UNSUPPORTED = ("use_dora", "use_qalora", "alora_invocation_tokens", "trainable_token_indices", "target_parameters")
PREFIX = "base_model.model."


class LoraCheckpoint(Checkpoint):
    """A base checkpoint seen through one adapter directory. Identity is derived from both."""

    def __init__(self, base: Checkpoint, path: Path) -> None:
        self.base = base
        self.path = path
        self.reference = f"{base.reference}+{path}"
        self.name = f"{base.name}+{path.resolve().name}"
        self.config = base.config
        self.generation_config = base.generation_config
        self.chat_template = base.chat_template
        self.adapter_file = path / "adapter_model.safetensors"
        if not self.adapter_file.exists():
            raise CheckpointError(f"{path} holds no adapter_model.safetensors.", hint="Is it a PEFT LoRA directory?")
        self.adapter = read_json(path / "adapter_config.json")
        self._check_kind()
        self._pairs = self._find_pairs()
        self._cache: dict[str, Tensor] | None = None

    def _check_kind(self) -> None:
        if self.adapter.get("peft_type", "LORA") != "LORA":
            raise UnsupportedModel(f"{self.path} is a {self.adapter['peft_type']} adapter; only LORA is supported.")
        for key in (*UNSUPPORTED, "modules_to_save"):
            if self.adapter.get(key):
                raise UnsupportedModel(f"{self.path}: `{key}` is not supported.", hint="Merge it with PEFT first.")
        if self.adapter.get("bias", "none") != "none":
            raise UnsupportedModel(f"{self.path}: a trained `bias` is not supported.", hint="Merge it with PEFT first.")

    def _find_pairs(self) -> dict[str, str]:
        """Base tensor name -> adapter key prefix, every key accounted for."""
        pairs: dict[str, str] = {}
        for key in read_header(self.adapter_file):
            module, _, part = key.partition(".lora_")
            target = module.removeprefix(PREFIX) + ".weight"
            if part not in ("A.weight", "B.weight") or target not in self.base:
                raise CheckpointError(f"{self.path}: the adapter tensor `{key}` fits nothing in {self.base.reference}.")
            pairs[target] = module
        return pairs

    def _scale(self, module: str) -> float:
        name = module.removeprefix(PREFIX)

        def pick(pattern: str, default: str) -> float:
            table: dict[str, Any] = self.adapter.get(pattern) or {}
            found = [value for key, value in table.items() if name == key or name.endswith("." + key)]
            return float(found[0] if found else self.adapter[default])

        rank, alpha = pick("rank_pattern", "r"), pick("alpha_pattern", "lora_alpha")
        return alpha / (rank**0.5 if self.adapter.get("use_rslora") else rank)

    def _tensors(self) -> dict[str, Tensor]:
        if self._cache is None:
            from safetensors.torch import load_file

            self._cache = load_file(self.adapter_file)
        return self._cache

    def info(self, name: str) -> TensorInfo:
        info = self.base.info(name)
        quantised = name in self._pairs and self.base.quantized(name) is not None
        return TensorInfo(name, info.shape, "float32") if quantised else info

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        if name not in self._pairs:
            return weight
        delta = product(*self.factors(name))
        if delta.shape != weight.shape:
            raise CheckpointError(
                f"{self.path}: the delta of `{name}` is {tuple(delta.shape)}, the weight {tuple(weight.shape)}."
            )
        return (weight.float() + delta).to(weight.dtype)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        return super().reader(name) if name in self._pairs else self.base.reader(name)

    def _stored_factors(self, module: str) -> tuple[Tensor, Tensor]:
        tensors = self._tensors()
        return tensors[f"{module}.lora_A.weight"].float(), tensors[f"{module}.lora_B.weight"].float()

    @property
    def targets(self) -> list[str]:
        """The tensors that the adapter changes."""
        return sorted(self._pairs)

    def factors(self, name: str) -> tuple[Tensor, Tensor]:
        """up [out, r] and down [r, in] of a target in the orientation of its weight, the scale folded into up."""
        module = self._pairs[name]
        down, up = self._stored_factors(module)
        scale = self._scale(module)
        return (down.T * scale, up.T.contiguous()) if self.adapter.get("fan_in_fan_out") else (up * scale, down)

    @property
    def has_blocks(self) -> bool:
        return self.base.has_blocks

    def quantized(self, name: str) -> Any:
        return None if name in self._pairs else self.base.quantized(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def identity(self) -> str:
        with self.adapter_file.open("rb") as handle:
            weights = hashlib.file_digest(handle, "sha256").hexdigest()
        return identity.derived("lora", {"config": self.adapter, "weights": weights}, [self.base.identity])

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def close(self) -> None:
        self._cache = None
        self.base.close()
