"""A `.gguf` file as a Checkpoint: Hugging Face's names, shapes, row order and values.

Blocks are dequantised per tensor through the `gguf` package; `quantized()` gives them as they lie.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gnomon.errors import UnsupportedModel
from gnomon.models import gguf_names, identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo
from gnomon.models.gguf_file import GgufFile, GgufTensor

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.kernels.operators import QuantizedTensor
    from gnomon.models.tokenizer import Tokenizer

PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


class GgufCheckpoint(Checkpoint):
    """One GGUF file."""

    def __init__(self, path: Path, reference: str | None = None) -> None:
        self.path = self.file_path = path
        self.reference = reference or str(path)
        self.name = path.stem if reference is None or reference.endswith(".gguf") else reference
        self.file = GgufFile(path)
        metadata = self.file.metadata
        self.architecture = gguf_names.architecture(metadata)
        self._tensors: dict[str, GgufTensor] = {}
        for name, tensor in self.file.tensors.items():
            if (known := gguf_names.tensor_name(name, self.architecture)) is not None:
                self._tensors[known] = tensor
        if "model.embed_tokens.weight" not in self._tensors:
            raise UnsupportedModel(f"{path} has no token embedding.")
        vocabulary = self._tensors["model.embed_tokens.weight"].shape[0]
        tied = "lm_head.weight" not in self._tensors
        self.config: dict[str, Any] = gguf_names.config(metadata, vocabulary=vocabulary, tied=tied)
        self.generation_config: dict[str, Any] = {}
        template = metadata.get("tokenizer.chat_template")
        self.chat_template = template if isinstance(template, str) else None

    def info(self, name: str) -> TensorInfo:
        tensor = self._tensors[name]
        return TensorInfo(name, tensor.shape, tensor.type_name)

    def __getitem__(self, name: str) -> Tensor:
        import torch

        values = self._values(self._tensors[name])
        if self._is_permuted(name):
            values = values[self._row_order(name)]
        if self.architecture in gguf_names.NORM_PLUS_ONE and name.endswith("norm.weight"):
            values = values - np.float32(1)
        return torch.from_numpy(np.ascontiguousarray(values))

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        """Dequantises only the rows that are asked for (rows that llama.cpp reordered: the whole tensor, once)."""
        if self._is_permuted(name) or len(self._tensors[name].shape) < 2:
            return super().reader(name)
        import torch

        tensor = self._tensors[name]
        columns, rows = tensor.shape[-1], prod(tensor.shape[:-1])
        row_bytes = (tensor.end - tensor.begin) // rows

        def read(start: int, stop: int) -> Tensor:
            first, last = start // columns, -(-stop // columns)
            begin = tensor.begin + first * row_bytes
            part = replace(tensor, shape=(last - first, columns), begin=begin, end=begin + (last - first) * row_bytes)
            flat = torch.from_numpy(np.ascontiguousarray(self._values(part))).reshape(-1)
            return flat[start - first * columns : stop - first * columns]

        return read

    @property
    def has_blocks(self) -> bool:
        return any(len(t.shape) == 2 and t.type_name not in (*PLAIN, "BF16") for t in self._tensors.values())

    def quantized(self, name: str) -> QuantizedTensor | None:
        import torch

        from gnomon.kernels.operators import QuantizedTensor

        tensor = self._tensors[name]
        if tensor.type_name in (*PLAIN, "BF16") or len(tensor.shape) != 2:
            return None
        rows = self._bytes(tensor).reshape(tensor.shape[0], -1)
        if self._is_permuted(name):
            rows = rows[self._row_order(name)]
        shape = (tensor.shape[0], tensor.shape[1])
        return QuantizedTensor(torch.from_numpy(np.array(rows)), shape, tensor.type_name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def identity(self) -> str:
        return identity.cached([self.file_path], self._compute_identity)

    def _compute_identity(self) -> str:
        def digest(tensor: GgufTensor) -> str:
            return hashlib.sha256(memoryview(self.file.data)[tensor.begin : tensor.end]).hexdigest()

        return identity.of_tensors((n, t.type_name, t.shape, digest(t)) for n, t in self._tensors.items())

    def tokenizer(self) -> Tokenizer:
        from gnomon.models.tokenizer import Tokenizer

        return Tokenizer.from_gguf(self.file.metadata)

    def _bytes(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
        return np.frombuffer(self.file.data, np.uint8, tensor.end - tensor.begin, tensor.begin)

    def _values(self, tensor: GgufTensor) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The tensor as float32."""
        raw = self._bytes(tensor)
        if tensor.type_name in PLAIN:
            return raw.view(PLAIN[tensor.type_name]).reshape(tensor.shape).astype(np.float32)
        if tensor.type_name == "BF16":
            return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape)
        from gguf import GGMLQuantizationType, quants

        kind = GGMLQuantizationType[tensor.type_name]
        try:
            values: np.ndarray[Any, np.dtype[np.float32]] = quants.dequantize(raw.reshape(*tensor.shape[:-1], -1), kind)
        except NotImplementedError:
            raise UnsupportedModel(
                f"{self.reference}: tensor `{tensor.name}` has block type {tensor.type_name}, which is not supported."
            ) from None
        return values.reshape(tensor.shape)

    def _is_permuted(self, name: str) -> bool:
        return self.architecture in gguf_names.PERMUTED and name.endswith(("q_proj.weight", "k_proj.weight"))

    def _row_order(self, name: str) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Rows in Hugging Face's order: llama.cpp interleaves each head's two rotary halves."""
        key = "num_attention_heads" if "q_proj" in name else "num_key_value_heads"
        heads = self.config[key]
        rows = np.arange(self._tensors[name].shape[0])
        return rows.reshape(heads, -1, 2).swapaxes(1, 2).reshape(-1)
