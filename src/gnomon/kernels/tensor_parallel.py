"""Tensor parallelism whose bits do not depend on the number of ranks.

A row-parallel product is a sum over K. Its K axis is cut into LEAVES pieces, whatever the number of ranks; each piece
is one canonical product, and the pieces are added by one binary tree. A rank holds whole pieces side by side and adds
its own subtree; the roots of all subtrees are gathered (exact) and every rank adds them by the same upper tree. So any
number of ranks does the same additions in the same order. A column-parallel product splits outputs, which no sum joins.
Legend: T rows, K inputs, k inputs of this rank, N outputs, n outputs of this rank, L leaves of this rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.kernels.operators import LinearWeight, Operators

LEAVES = 8
"""Pieces of every row-parallel sum: the most ranks there can be, and part of the numbers."""


def tree_sum(parts: Sequence[Tensor]) -> Tensor:
    """Neighbours first, then neighbouring sums: the one order. The number of parts is a power of two."""
    level = list(parts)
    while len(level) > 1:
        level = [level[i] + level[i + 1] for i in range(0, len(level), 2)]
    return level[0]


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks. group None: a single rank, no torch.distributed needed."""

    rank: int = 0
    count: int = 1
    group: Any = None

    def __post_init__(self) -> None:
        if self.count < 1 or LEAVES % self.count or not 0 <= self.rank < self.count:
            raise UsageError(
                f"{self.count} ranks cannot share {LEAVES} leaves of a sum.",
                hint="Use 1, 2, 4 or 8.",
                param="tensor_parallel",
            )

    @classmethod
    def of_process_group(cls, group: Any = None) -> Ranks:
        """The ranks of an initialised torch.distributed group (default: the world)."""
        return cls(dist.get_rank(group), dist.get_world_size(group), group or dist.group.WORLD)

    def gather(self, own: Tensor) -> list[Tensor]:
        """Every rank's tensor, in rank order: bytes are moved, nothing is added."""
        if self.count == 1:
            return [own]
        parts = [torch.empty_like(own) for _ in range(self.count)]
        dist.all_gather(parts, own.contiguous(), group=self.group)
        return parts

    def share(self, size: int, what: str) -> slice:
        """This rank's part of an axis. Raises UsageError where it cannot be cut evenly."""
        if size % self.count:
            raise UsageError(f"{size} {what} cannot be shared by {self.count} ranks.", param="tensor_parallel")
        each = size // self.count
        return slice(self.rank * each, (self.rank + 1) * each)


class ColumnParallelLinear:
    """y = x W^T + b with the outputs shared out: [T, K] -> this rank's [T, n]."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, operators: Operators, ranks: Ranks) -> None:
        own = ranks.share(weight_NK.shape[0], "outputs")
        self.operators = operators
        self.weight = operators.linear_weight(weight_NK[own].contiguous())
        self.bias_n = None if bias_N is None else bias_N[own].contiguous()

    def __call__(self, x_TK: Tensor) -> Tensor:
        return self.operators.linear(x_TK, self.weight, self.bias_n)


class RowParallelLinear:
    """y = x W^T + b with the inputs shared out: this rank's [T, k] -> the whole [T, N], on every rank."""

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, operators: Operators, ranks: Ranks) -> None:
        if weight_NK.shape[1] % LEAVES:
            raise UsageError(
                f"{weight_NK.shape[1]} inputs cannot be cut into {LEAVES} leaves.", param="tensor_parallel"
            )
        self.operators = operators
        self.ranks = ranks
        self.bias_N = bias_N
        self._own_Nk = weight_NK[:, ranks.share(weight_NK.shape[1], "inputs")]

    @cached_property
    def leaves(self) -> list[LinearWeight]:
        pieces = self._own_Nk.chunk(LEAVES // self.ranks.count, dim=1)
        return [self.operators.linear_weight(piece.contiguous()) for piece in pieces]

    def __call__(self, x_Tk: Tensor) -> Tensor:
        pieces = x_Tk.chunk(len(self.leaves), dim=1)
        own = tree_sum([self.operators.linear(x.contiguous(), w) for x, w in zip(pieces, self.leaves, strict=True)])
        y_TN = tree_sum(self.ranks.gather(own))
        return y_TN if self.bias_N is None else y_TN + self.bias_N
