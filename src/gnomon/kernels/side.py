"""The side path: low-rank deltas that run in float32 beside weights of any kind, for some rows of a batch.

y += up (down x) with canonical products, so a row's bits depend on that row and its patches alone, and rows without
patches are computed as if there were none. Knows nothing of patch files or names.
Legend: T rows, K inputs, N outputs, r rank, V vocabulary, C hidden channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from gnomon.kernels.operators import LinearWeight, Operators
    from gnomon.kernels.wrappers import Wrapping

SLOTS = ("query", "key", "value", "attention_out", "gate", "up", "down")
"""The projections of a layer, in csrc/side.h's order."""


@dataclass(frozen=True)
class SideDelta:
    """up [N, r], down [r, K], float32. offset: the first of its columns in the fused product it is added to."""

    up: LinearWeight
    down: LinearWeight
    offset: int = 0

    def add_to(self, y_TN: Tensor, x_TK: Tensor, operators: Operators) -> None:
        """In place."""
        added = operators.linear(operators.linear(x_TK, self.down), self.up)
        y_TN[:, self.offset : self.offset + self.up.n] += added


@dataclass(frozen=True)
class SideEmbedding:
    """Rows added to looked-up embeddings: up [V, r], down transposed [C, r]."""

    up_Vr: Tensor
    down: LinearWeight

    def add_to(self, y_TC: Tensor, token_ids_T: Tensor, operators: Operators) -> None:
        """In place."""
        y_TC += operators.linear(self.up_Vr.index_select(0, token_ids_T), self.down)


@dataclass(frozen=True, eq=False)
class SidePath:
    """One patch, laid out for one network. layers: per layer, a delta or None per slot. modules: for networks that
    are not ours, up and down by the name of the module. wrappers: by layer, what acts on activations.
    """

    layers: tuple[tuple[SideDelta | None, ...], ...] = ()
    embedding: SideEmbedding | None = None
    head: SideDelta | None = None
    modules: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    wrappers: Mapping[int, tuple[Wrapping, ...]] = field(default_factory=dict)
    native: list[Any] = field(default_factory=list, repr=False)
    """The same as C structures, made once by the operators that want them."""


@dataclass(frozen=True)
class SideRows:
    """Adjacent rows [begin, end) and the patches that run beside them, in order."""

    begin: int
    end: int
    paths: tuple[SidePath, ...]


def grouped(rows: Sequence[tuple[int, tuple[SidePath, ...]]]) -> list[SideRows]:
    """(row count, patches) of successive spans as groups of rows; neighbours with the same patches join."""
    groups: list[SideRows] = []
    at = 0
    for count, paths in rows:
        if paths and count:
            if groups and groups[-1].end == at and groups[-1].paths == paths:
                groups[-1] = SideRows(groups[-1].begin, at + count, paths)
            else:
                groups.append(SideRows(at, at + count, paths))
        at += count
    return groups


def add_layer(
    groups: Sequence[SideRows], layer: int, slots: range, x_TK: Tensor, y_TN: Tensor, operators: Operators
) -> None:
    """Add every patch's deltas of these slots of one layer to the product y of x, in place."""
    for group in groups:
        rows = slice(group.begin, group.end)
        for path in group.paths:
            for slot in slots:
                if (delta := path.layers[layer][slot]) is not None:
                    delta.add_to(y_TN[rows], x_TK[rows], operators)


def add_embedding(groups: Sequence[SideRows], token_ids_T: Tensor, y_TC: Tensor, operators: Operators) -> None:
    """Add every patch's change of the embedding to the rows that were looked up, in place."""
    for group in groups:
        rows = slice(group.begin, group.end)
        for path in group.paths:
            if path.embedding is not None:
                path.embedding.add_to(y_TC[rows], token_ids_T[rows], operators)


def add_head(groups: Sequence[SideRows], x_RC: Tensor, y_RV: Tensor, operators: Operators) -> None:
    """Add every patch's change of the head to the logits, in place."""
    for group in groups:
        rows = slice(group.begin, group.end)
        for path in group.paths:
            if path.head is not None:
                path.head.add_to(y_RV[rows], x_RC[rows], operators)
