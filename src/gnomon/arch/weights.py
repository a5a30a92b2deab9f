"""Weights on their way from a checkpoint into a network: fused, checked, and still visible under their own names.

Several projections of one input are laid out as one [sum N, K] weight, so that one product does them all; the
original tensors remain views of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gnomon.errors import CheckpointError
from gnomon.kernels.large_pages import LargePages
from gnomon.kernels.operators import LinearWeight, Operators, QuantizedTensor
from gnomon.models.checkpoint import Checkpoint, missing_tensor


@dataclass(frozen=True)
class Projection:
    """y = x W^T + b, where W may lie in several parts (quantised parts of different types cannot be joined)."""

    parts: tuple[LinearWeight, ...]
    biases: tuple[Tensor | None, ...]
    operators: Operators

    @property
    def weighted(self) -> tuple[tuple[LinearWeight, Tensor | None], ...]:
        return tuple(zip(self.parts, self.biases, strict=True))

    def __call__(self, x_TK: Tensor) -> Tensor:
        """[T, K] -> [T, N]."""
        outputs = [self.operators.linear(x_TK, w, b) for w, b in zip(self.parts, self.biases, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)


@dataclass(frozen=True)
class Derived:
    """A float32 vector that the operators use, made from a stored one: widened, joined, or plus one."""

    stored: Tensor
    used: Tensor
    add_one: bool

    def renew(self) -> None:
        self.used.copy_(self.stored.float() + self.add_one)


class WeightLoader:
    """Takes tensors out of a checkpoint by name, checking shapes; remembers every live tensor by its name."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators) -> None:
        self.checkpoint = checkpoint
        self.operators = operators
        self.live: dict[str, Tensor] = {}
        self.derived: list[Derived] = []
        self.memory = LargePages()

    def vector(self, name: str, size: int, *, add_one: bool = False) -> Tensor:
        """A norm weight or bias, float32. add_one: for networks whose norms multiply by 1 + w."""
        stored = self._stored(name, size)
        if stored.dtype == torch.float32 and not add_one:
            return stored
        self.derived.append(Derived(stored, stored.float() + add_one, add_one))
        return self.derived[-1].used

    def _stored(self, name: str, size: int) -> Tensor:
        """A vector as the profile holds weights, and as `module()` shares it."""
        tensor = self._tensor(name, (size,)).to(torch.float32).clone()
        if self.operators.dtype == "bf16":
            tensor = tensor.to(torch.bfloat16).to(self.operators.storage)
        self.live[name] = tensor
        return tensor

    def table(self, name: str, rows: int, columns: int) -> LinearWeight:
        """One [N, K] weight on its own (the embedding, the head)."""
        return self._weights([name], [rows], columns)[0]

    def projection(self, names: list[str], sizes: list[int], k: int, *, bias: bool) -> Projection:
        """Projections of one input, `names` without their ".weight" / ".bias"."""
        parts = self._weights([f"{name}.weight" for name in names], sizes, k)
        if not bias:
            return Projection(parts, (None,) * len(parts), self.operators)
        if len(parts) > 1:
            biases = [self.vector(f"{name}.bias", size) for name, size in zip(names, sizes, strict=True)]
            return Projection(parts, tuple(biases), self.operators)
        joined = torch.empty(sum(sizes))
        for name, size, used in zip(names, sizes, torch.split(joined, sizes), strict=True):
            self.derived.append(Derived(self._stored(f"{name}.bias", size), used, False))
            self.derived[-1].renew()
        return Projection(parts, (joined,), self.operators)

    def _weights(self, names: list[str], sizes: list[int], k: int) -> tuple[LinearWeight, ...]:
        """One joined weight, or one per name where the profile keeps the file's own blocks."""
        if self.operators.dtype == "gguf":
            blocks: list[QuantizedTensor | Tensor]
            blocks = [self._quantized(name, (size, k)) for name, size in zip(names, sizes, strict=True)]
            return tuple(self._placed(self.operators.linear_weight(block)) for block in _joined(blocks))
        joined = torch.empty(sum(sizes), k)
        for name, size, rows in zip(names, sizes, torch.split(joined, sizes), strict=True):
            rows.copy_(self._tensor(name, (size, k)))
        weight = self._placed(self.operators.linear_weight(joined))
        if weight.tensor is not None:
            for name, rows in zip(names, torch.split(weight.tensor, sizes), strict=True):
                self.live[name] = rows
        return (weight,)

    def _placed(self, weight: LinearWeight) -> LinearWeight:
        data = self.memory.moved(weight.data)
        return replace(weight, data=data, tensor=None if weight.tensor is None else data)

    def _quantized(self, name: str, shape: tuple[int, int]) -> QuantizedTensor | Tensor:
        """The file's own blocks; a tensor that the file keeps plain comes as float32."""
        self._check(name, shape)
        blocks = self.checkpoint.quantized(name)
        return blocks if blocks is not None else self.checkpoint[name].float()

    def _tensor(self, name: str, shape: tuple[int, ...]) -> Tensor:
        self._check(name, shape)
        return self.checkpoint[name]

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self.checkpoint:
            raise missing_tensor(self.checkpoint, name)
        found = tuple(self.checkpoint.info(name).shape)
        if found != shape:
            raise CheckpointError(
                f"{self.checkpoint.reference}: tensor `{name}` has shape {found}, its config asks for {shape}."
            )


def _joined(blocks: list[QuantizedTensor | Tensor]) -> list[QuantizedTensor | Tensor]:
    """Parts of one block type as one, so that one product does them all."""
    quantized = [block for block in blocks if isinstance(block, QuantizedTensor)]
    if len(quantized) < len(blocks) or len({block.type_name for block in quantized}) > 1:
        return blocks
    rows, first = torch.cat([block.rows for block in quantized]), quantized[0]
    return [QuantizedTensor(rows, (rows.shape[0], first.shape[1]), first.type_name)]
