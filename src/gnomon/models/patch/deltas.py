"""What a patch adds to one tensor: a low-rank product, a few entries, or a whole tensor.

A delta is a value: nothing changes it after it was made, and a non-finite number in it is refused when it is made.
Knows nothing of checkpoints, files or names.
Legend: r rank, o outputs (rows of the weight), i inputs (columns), n entries.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models.low_rank import product

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class LowRank:
    """W + up @ down: up [o, r], down [r, i]."""

    up: Tensor
    down: Tensor

    kind = "low-rank"

    def __post_init__(self) -> None:
        if self.up.dim() != 2 or self.down.dim() != 2 or self.up.shape[1] != self.down.shape[0]:
            raise PatchError(
                f"A low-rank delta needs up [out, r] and down [r, in], not {_shape(self.up)} and {_shape(self.down)}."
            )
        if self.rank == 0:
            raise PatchError("A low-rank delta of rank 0 changes nothing.", hint="Leave the tensor out.")
        _check_numbers(up=self.up, down=self.down)

    @property
    def rank(self) -> int:
        return self.up.shape[1]

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1])

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"up": self.up, "down": self.down}

    def full(self) -> Tensor:
        """The delta as a tensor [o, i], float32, the same bits on every machine."""
        return product(self.up, self.down)

    def scaled(self, factor: float) -> LowRank:
        return LowRank(_scaled(self.up, factor), self.down)

    def norm(self) -> float:
        """Frobenius norm, from the factors alone."""
        up, down = self.up.double(), self.down.double()
        squared = ((up.T @ up) * (down @ down.T)).sum()
        return math.sqrt(max(float(squared), 0.0))


@dataclass(frozen=True, eq=False)
class Sparse:
    """A few entries of a tensor of this shape: int64 indices [n] into the flattened tensor, ascending; values [n]."""

    indices: Tensor
    values: Tensor
    shape: tuple[int, ...]

    kind = "sparse"

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))
        if self.indices.dim() != 1 or self.indices.shape != self.values.shape or self.indices.dtype != torch.int64:
            raise PatchError(
                f"A sparse delta needs int64 indices [n] and values [n], not {self.indices.dtype} "
                f"{_shape(self.indices)} and {_shape(self.values)}."
            )
        size = math.prod(self.shape)
        ordered = bool((self.indices[1:] > self.indices[:-1]).all())
        if len(self.indices) and (not ordered or self.indices[0] < 0 or self.indices[-1] >= size):
            raise PatchError(f"A sparse delta's indices must ascend within 0..{size - 1}, each once.")
        _check_numbers(values=self.values)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"indices": self.indices, "values": self.values}

    def full(self) -> Tensor:
        """The delta as a tensor, float32."""
        flat = torch.zeros(math.prod(self.shape))
        flat[self.indices] = self.values.float()
        return flat.reshape(self.shape)

    def scaled(self, factor: float) -> Sparse:
        return Sparse(self.indices, _scaled(self.values, factor), self.shape)

    def norm(self) -> float:
        return float(self.values.double().norm())


@dataclass(frozen=True, eq=False)
class Dense:
    """A whole tensor to add."""

    tensor: Tensor

    kind = "dense"

    def __post_init__(self) -> None:
        _check_numbers(tensor=self.tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {"delta": self.tensor}

    def full(self) -> Tensor:
        """The delta, float32."""
        return self.tensor.float()

    def scaled(self, factor: float) -> Dense:
        return Dense(_scaled(self.tensor, factor))

    def norm(self) -> float:
        return float(self.tensor.double().norm())


Delta = LowRank | Sparse | Dense


def from_parts(parts: Mapping[str, Tensor], shape: tuple[int, ...] | None) -> Delta:
    """The delta whose `tensors` these are. Raises PatchError for parts that make none."""
    names = set(parts)
    if names == {"up", "down"}:
        return LowRank(parts["up"], parts["down"])
    if names == {"indices", "values"} and shape is not None:
        return Sparse(parts["indices"], parts["values"], shape)
    if names == {"delta"}:
        return Dense(parts["delta"])
    raise PatchError(f"The parts {', '.join(sorted(names))} make no delta.")


def add(first: Delta, second: Delta) -> Delta:
    """Both at once. Low-rank factors are laid side by side, sparse entries joined; anything else becomes dense."""
    if first.shape != second.shape:
        raise PatchError(f"Deltas of shapes {first.shape} and {second.shape} do not add up.")
    if isinstance(first, LowRank) and isinstance(second, LowRank):
        return LowRank(torch.cat([first.up, second.up], dim=1), torch.cat([first.down, second.down], dim=0))
    if isinstance(first, Sparse) and isinstance(second, Sparse):
        indices, place = torch.unique(torch.cat([first.indices, second.indices]), return_inverse=True)
        split = len(first.indices)
        values = torch.zeros(len(indices))
        values[place[:split]] += first.values.float()
        values[place[split:]] += second.values.float()
        return Sparse(indices, values, first.shape)
    return Dense(first.full() + second.full())


def compressed(delta: Delta, *, rank: int | None, energy: float | None) -> LowRank:
    """The best low-rank approximation of a two-dimensional delta, by singular values.

    rank: at most this many. energy: as few as keep this share of the squared Frobenius norm. A low-rank delta is
    decomposed through its small factors. What is exactly zero is dropped.
    """
    if isinstance(delta, LowRank):
        if energy is None and rank is not None and delta.rank <= rank:
            return delta
        left, tri_up = torch.linalg.qr(delta.up.double())
        right, tri_down = torch.linalg.qr(delta.down.double().T)
        inner, values, outer = torch.linalg.svd(tri_up @ tri_down.T)
        up, down = left @ inner, outer @ right.T
    else:
        up, values, down = _singular(delta.full().double())
    kept = max(_kept(values, rank, energy), 1)
    root = values[:kept].sqrt()
    return LowRank((up[:, :kept] * root).float().contiguous(), (root[:, None] * down[:kept]).float().contiguous())


def _singular(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(left [m, k], values [k] descending, right [k, n]) of a float64 matrix [m, n], k = min(m, n).

    By the eigenvectors of the smaller Gram matrix, some ten times as fast as torch's own decomposition. Values below
    1e-8 of the greatest are lost in that; what is kept of a float32 delta begins above them.
    """
    if len(matrix) > matrix.shape[1]:
        left, values, right = _singular(matrix.T)
        return right.T, values, left.T
    vectors = torch.linalg.eigh(matrix @ matrix.T)[1]
    scaled = vectors.T @ matrix
    values, order = scaled.norm(dim=1).sort(descending=True)
    return vectors[:, order], values, scaled[order] / values.clamp_min(1e-300)[:, None]


def _kept(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many singular values (descending) to keep."""
    smallest = float(values[0]) * torch.finfo(torch.float32).eps if len(values) else 0.0
    most = int((values > smallest).sum())
    if rank is not None:
        most = min(most, rank)
    if energy is not None:
        shares = torch.cumsum(values**2, 0) / (values**2).sum().clamp_min(1e-300)
        most = min(most, int((shares < energy).sum()) + 1)
    return most


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    """Times a factor, in the tensor's own type where that is exact (a sign), in float32 otherwise."""
    if abs(factor) == 1.0:
        return tensor * factor
    return (tensor.double() * factor).float()


def _check_numbers(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype not in FLOATS:
            raise PatchError(f"A delta's `{name}` must hold floating-point numbers, not {tensor.dtype}.")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise PatchError(f"A delta's `{name}` holds {bad} numbers that are NaN or infinite.")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)
