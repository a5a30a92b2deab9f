"""One output tensor's inputs, seen block by block, so that no tensor need ever be held whole.

A block is a run of whole rows (of a tensor seen as [rows, columns]). The grid of blocks is fixed by the shape alone:
sums are taken per block and added in order, so results do not depend on threads, memory limits or sharding.
Legend: R rows of a block, C columns. Knows nothing of files, models or methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from gnomon.errors import MergeError
from gnomon.kernels import merging
from gnomon.merge.parallel import ordered_map

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.merge.data import Data
    from gnomon.merge.randomness import Randomness
    from gnomon.models.checkpoint import Checkpoint

BLOCK_ELEMENTS = 1 << 18
HELD_BYTES = 16 << 20
"""A tensor whose inputs take no more than this is read once and held while it is merged."""
ARITHMETIC = 4
"""Raised when what a merge computes changes by a bit: part of derived identities."""
LANES = 16
Reader = Callable[[int, int], "Tensor"]
"""reader(start, stop): elements start..stop of a tensor, flat in row-major order."""
T = TypeVar("T")


@dataclass
class Block:
    """Rows of every input, as they are stored (flat), and as the arithmetic wants them.

    start: flat index of the first element in the whole tensor. raw: one flat tensor per model; raw_base: the base's.
    """

    index: int
    start: int
    raw: list[Tensor]
    raw_base: Tensor | None
    view: TensorView
    _models: list[Tensor] | None = None
    _base: Tensor | None = None
    _deltas: list[Tensor] | None = None

    @property
    def native(self) -> bool:
        """Whether the native kernels may compute on the stored rows: same bits, without temporaries."""
        inputs = self.raw if self.raw_base is None else [*self.raw, self.raw_base]
        return self.view.dtype is torch.float32 and merging.takes(inputs)

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.raw[0].numel() // max(1, self.view.columns), self.view.columns))

    @property
    def models_RC(self) -> list[Tensor]:
        """One [R, C] tensor per model."""
        if self._models is None:
            self._models = [self._rows(flat) for flat in self.raw]
        return self._models

    @property
    def base_RC(self) -> Tensor | None:
        """The base's rows; None without a base."""
        if self._base is None and self.raw_base is not None:
            self._base = self._rows(self.raw_base)
        return self._base

    def _rows(self, flat: Tensor) -> Tensor:
        return flat.to(self.view.dtype).reshape(-1, self.view.columns)

    @property
    def base(self) -> Tensor:
        """The base's rows; the registry has checked that there is one."""
        if self.base_RC is None:
            raise MergeError("This method needs a base model.", hint="Set `base_model`.")
        return self.base_RC

    def deltas(self) -> list[Tensor]:
        """Task vectors, model minus base, one [R, C] tensor per model; computed once per block."""
        if self._deltas is None:
            self._deltas = [model_RC - self.base for model_RC in self.models_RC]
        return self._deltas

    def per_column(self, values: Tensor) -> Tensor:
        """One value per column (everything but the first dimension) laid out as this block: [R, C]."""
        places = torch.arange(self.start, self.start + self.raw[0].numel()) % len(values)
        return values[places].reshape(self.models_RC[0].shape).to(self.models_RC[0].dtype)

    def vectors(self) -> list[Tensor]:
        """Task vectors where there is a base, else the models themselves."""
        return self.models_RC if self.base_RC is None else self.deltas()


@dataclass
class TensorView:
    """Everything that goes into one output tensor. dtype: what the arithmetic is done in."""

    name: str
    shape: tuple[int, ...]
    readers: Sequence[Reader]
    base_reader: Reader | None
    dtype: torch.dtype
    random: Randomness
    labels: Sequence[str] = ()
    allow_nonfinite: bool = False
    threads: int = 1
    cast: torch.dtype | None = None
    """A narrower type that inputs are first rounded to (mergekit's `dtype`)."""
    stored: torch.dtype = torch.float32
    """The type that all inputs promote to, after that."""
    statistics: Sequence[Tensor] = ()
    """For methods that look at data: one tensor per model (statistics.py)."""
    texts: Callable[[], tuple[Sequence[Checkpoint], Sequence[Data]]] | None = None
    """For methods that run the models themselves: the models, and each one's text."""
    learned: Sequence[float] = ()
    """For methods whose weights are found on texts (learned.py): one per model."""
    siblings: Callable[[], Sequence[TensorView]] | None = None
    """All tensors of the merge that this one's method merges, itself included, in the plan's order."""
    once: Callable[[str, Callable[[], Any]], Any] | None = None
    """once(key, make): make() kept for the whole merge."""
    out_dtype: torch.dtype = torch.float32
    """What the result will be rounded to; a method may return its rows in it already."""
    _checked: set[int] = field(default_factory=set)

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def rows_per_block(self) -> int:
        return max(1, BLOCK_ELEMENTS // max(1, self.columns))

    def block_count(self) -> int:
        return -(-self.rows // self.rows_per_block) if self.numel else 0

    def block(self, index: int) -> Block:
        """Read one block. Raises MergeError when an input holds NaN or infinity."""
        first = index * self.rows_per_block
        last = min(self.rows, first + self.rows_per_block)
        start, stop = first * self.columns, last * self.columns
        parts = [self._read(reader, start, stop) for reader in self.readers]
        base = self._read(self.base_reader, start, stop) if self.base_reader is not None else None
        if index not in self._checked:
            self._check([*parts, *([base] if base is not None else [])])
            self._checked.add(index)
        return Block(index, start, parts, base, self)

    def whole(self) -> tuple[list[Tensor], Tensor | None]:
        """Every input at once, in the stored type: the models' tensors, and the base's."""

        def read(reader: Reader) -> Tensor:
            return self._read(reader, 0, self.numel).to(self.stored).reshape(self.shape)

        models, base = [read(reader) for reader in self.readers], None
        if self.base_reader is not None:
            base = read(self.base_reader)
        self._check([tensor.reshape(-1) for tensor in (*models, *([base] if base is not None else []))])
        return models, base

    def hold(self) -> None:
        """Read small inputs once, for methods that pass over them again and again."""
        readers = [*self.readers, *([self.base_reader] if self.base_reader is not None else [])]
        if self.numel * 4 * len(readers) <= HELD_BYTES:
            self.readers = [tensor_reader(reader(0, self.numel)) for reader in self.readers]
            if self.base_reader is not None:
                self.base_reader = tensor_reader(self.base_reader(0, self.numel))

    def _read(self, reader: Reader, start: int, stop: int) -> Tensor:
        flat = reader(start, stop)
        return flat.to(self.cast) if self.cast is not None else flat

    def _check(self, parts: Sequence[Tensor]) -> None:
        if self.allow_nonfinite:
            return
        for place, part in enumerate(parts):
            if not is_finite(part):
                label = self.labels[place] if place < len(self.labels) else f"input {place + 1}"
                raise MergeError(
                    f"Tensor `{self.name}` of {label} holds NaN or infinity.",
                    hint="Repair that model, or pass allow_nonfinite (--allow-nonfinite) to merge it as it is.",
                )

    def map(self, function: Callable[[Block], T]) -> list[T]:
        """function over all blocks, in parallel; results in the blocks' order."""
        return ordered_map(lambda index: function(self.block(index)), range(self.block_count()), self.threads)

    def sums(self, function: Callable[[Block], Sequence[Tensor]]) -> list[float]:
        """Sums over the whole tensor of each elementwise quantity that function gives, accumulated in float64."""
        rows = self.map(lambda block: [total(value_RC) for value_RC in function(block)])
        return [math.fsum(column) for column in zip(*rows, strict=True)]

    def column_sums(self, function: Callable[[Block], Sequence[Tensor]]) -> list[Tensor]:
        """Like sums, but down the first dimension: one float64 sum per place of the others."""
        wide = self.numel // max(1, self.shape[0])

        def add(block: Block) -> list[Tensor]:
            parts_RC = function(block)
            if wide == self.columns:
                return [part_RC.sum(0, dtype=torch.float64) for part_RC in parts_RC]
            places = torch.arange(block.start, block.start + parts_RC[0].numel()) % wide
            empty = torch.zeros(wide, dtype=torch.float64)
            return [empty.index_add(0, places, part_RC.reshape(-1).double()) for part_RC in parts_RC]

        return [torch.stack(column).sum(0) for column in zip(*self.map(add), strict=True)]


class ChainedView:
    """Several tensors seen as one long one: what a selection over a whole model runs on."""

    def __init__(self, views: Sequence[TensorView], threads: int) -> None:
        self.views = views
        self.threads = threads
        self.random = views[0].random
        self.starts = [0, *accumulate(view.numel for view in views)]
        self.numel = self.starts[-1]
        self._blocks = [(which, index) for which, view in enumerate(views) for index in range(view.block_count())]

    def start_of(self, name: str) -> int:
        """Where a tensor begins, as a flat index of the whole."""
        return next(start for view, start in zip(self.views, self.starts, strict=False) if view.name == name)

    def block_count(self) -> int:
        return len(self._blocks)

    def block(self, index: int) -> Block:
        which, inner = self._blocks[index]
        block = self.views[which].block(inner)
        block.start += self.starts[which]
        return block

    def map(self, function: Callable[[Block], T]) -> list[T]:
        return ordered_map(lambda index: function(self.block(index)), range(self.block_count()), self.threads)


def is_finite(flat: Tensor) -> bool:
    if merging.takes([flat]):
        return merging.finite(flat)
    low, high = torch.aminmax(flat)
    return math.isfinite(low) and math.isfinite(high)


def total(value: Tensor) -> float:
    """The sum in float64, in an order fixed by the length alone (whatever the number of threads)."""
    flat = value.reshape(-1)
    sums = merging.sums(flat) if flat.dtype is torch.float32 and merging.takes([flat]) else chunk_sums(flat)
    return math.fsum(sums.tolist())


def chunk_sums(flat: Tensor) -> Tensor:
    """[chunks] float64: 16 lanes down each chunk's rows, then halves of them onto each other (csrc/merging.cpp)."""
    chunks = -(-flat.numel() // merging.CHUNK)
    padded = torch.zeros(chunks * merging.CHUNK, dtype=torch.float64)
    padded[: flat.numel()] = flat
    rows = padded.view(chunks, -1, LANES)
    lanes = rows[:, 0].clone()
    for row in range(1, rows.shape[1]):
        lanes += rows[:, row]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def tensor_reader(tensor: Tensor) -> Reader:
    """A reader over a tensor in memory."""
    flat = tensor.reshape(-1)
    return lambda start, stop: flat[start:stop]
