"""A sentence encoder of the BERT family (arXiv 1810.04805), on operators that keep each text's bits its own.

Texts in, mean-pooled and L2-normalised vectors out; a text's vector is the same alone or among others, because each
text runs through products whose row count is of one class. Legend: L tokens, C channels, H heads, D head size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.errors import UnsupportedModel
from gnomon.kernels.operators import LinearWeight
from gnomon.kernels.threads import available_threads
from gnomon.kernels.torch_operators import TorchOperators
from gnomon.models.checkpoint import Checkpoint, missing_tensor
from gnomon.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class _Affine:
    weight: LinearWeight
    bias: Tensor


@dataclass(frozen=True)
class _Layer:
    query: _Affine
    key: _Affine
    value: _Affine
    out: _Affine
    out_norm: tuple[Tensor, Tensor]
    up: _Affine
    down: _Affine
    down_norm: tuple[Tensor, Tensor]


def build_encoder(checkpoint: Checkpoint, threads: int | None = None) -> Encoder:
    """Raises UnsupportedModel, CheckpointError."""
    return Encoder(checkpoint, TorchOperators("fp32", threads or available_threads()))


class Encoder:
    """Implements sentence embedding for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, operators: TorchOperators) -> None:
        config = checkpoint.config
        if (
            config.get("hidden_act", "gelu") != "gelu"
            or config.get("position_embedding_type", "absolute") != "absolute"
        ):
            raise UnsupportedModel(f"{checkpoint.reference}: only gelu and absolute positions are supported.")
        self.operators = operators
        self.heads: int = config["num_attention_heads"]
        self.eps: float = config["layer_norm_eps"]
        self.hidden_size: int = config["hidden_size"]
        self.tokenizer: Tokenizer = checkpoint.tokenizer()
        self.max_tokens = _max_tokens(checkpoint)
        self._prefix = "" if "embeddings.word_embeddings.weight" in checkpoint else "bert."
        self._checkpoint = checkpoint
        self.words = self._get("embeddings.word_embeddings.weight")
        self.positions = self._get("embeddings.position_embeddings.weight")
        self.kinds = self._get("embeddings.token_type_embeddings.weight")
        self.norm = self._norm("embeddings.LayerNorm")
        self.layers = [self._layer(f"encoder.layer.{i}") for i in range(config["num_hidden_layers"])]

    def _get(self, name: str) -> Tensor:
        if self._prefix + name not in self._checkpoint:
            raise missing_tensor(self._checkpoint, self._prefix + name)
        return self._checkpoint[self._prefix + name].float().clone()

    def _norm(self, name: str) -> tuple[Tensor, Tensor]:
        return self._get(f"{name}.weight"), self._get(f"{name}.bias")

    def _affine(self, name: str) -> _Affine:
        return _Affine(self.operators.linear_weight(self._get(f"{name}.weight")), self._get(f"{name}.bias"))

    def _layer(self, at: str) -> _Layer:
        return _Layer(
            query=self._affine(f"{at}.attention.self.query"),
            key=self._affine(f"{at}.attention.self.key"),
            value=self._affine(f"{at}.attention.self.value"),
            out=self._affine(f"{at}.attention.output.dense"),
            out_norm=self._norm(f"{at}.attention.output.LayerNorm"),
            up=self._affine(f"{at}.intermediate.dense"),
            down=self._affine(f"{at}.output.dense"),
            down_norm=self._norm(f"{at}.output.LayerNorm"),
        )

    def token_ids(self, text: str) -> list[int]:
        """A text's ids, cut to what the model was trained on, its closing token kept."""
        ids = self.tokenizer.encode(text)
        return ids if len(ids) <= self.max_tokens else [*ids[: self.max_tokens - 1], ids[-1]]

    def token_counts(self, texts: list[str]) -> list[int]:
        return [len(self.token_ids(text)) for text in texts]

    @torch.inference_mode()
    def embed(self, texts: list[str]) -> Tensor:
        """-> [n, C] float32, each row of length 1."""
        pooled = torch.stack([self._hidden(self.token_ids(text)).mean(dim=0) for text in texts])
        return torch.nn.functional.normalize(pooled, dim=-1)

    def _hidden(self, ids: list[int]) -> Tensor:
        x_LC = self.words[ids] + self.kinds[0] + self.positions[: len(ids)]
        x_LC = self._normalise(x_LC, self.norm)
        for layer in self.layers:
            x_LC = self._normalise(x_LC + self._linear(self._attend(x_LC, layer), layer.out), layer.out_norm)
            fed_LC = self._linear(torch.nn.functional.gelu(self._linear(x_LC, layer.up)), layer.down)
            x_LC = self._normalise(x_LC + fed_LC, layer.down_norm)
        return x_LC

    def _attend(self, x_LC: Tensor, layer: _Layer) -> Tensor:
        length, channels = x_LC.shape

        def heads(part: _Affine) -> Tensor:
            return self._linear(x_LC, part).view(length, self.heads, -1).transpose(0, 1)

        query_HLD, key_HLD, value_HLD = heads(layer.query), heads(layer.key), heads(layer.value)
        weights_HLL = torch.softmax(query_HLD @ key_HLD.transpose(1, 2) / query_HLD.shape[-1] ** 0.5, dim=-1)
        return (weights_HLL @ value_HLD).transpose(0, 1).reshape(length, channels)

    def _linear(self, x_LC: Tensor, part: _Affine) -> Tensor:
        return self.operators.linear(x_LC, part.weight, part.bias)

    def _normalise(self, x_LC: Tensor, norm: tuple[Tensor, Tensor]) -> Tensor:
        return torch.nn.functional.layer_norm(x_LC, (x_LC.shape[-1],), *norm, self.eps)


def _max_tokens(checkpoint: Checkpoint) -> int:
    """sentence-transformers' own limit, else the network's."""
    limit: int = checkpoint.config["max_position_embeddings"]
    if checkpoint.path is not None and (path := checkpoint.path / "sentence_bert_config.json").exists():
        limit = min(limit, json.loads(path.read_text()).get("max_seq_length") or limit)
    return limit
