"""What will be computed: one entry per output tensor, and the whole of them. Plain values; `plan.py` makes them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gnomon.merge.blocks import ARITHMETIC
from gnomon.merge.registry import methods


@dataclass(frozen=True)
class Source:
    """One input tensor of one model (by reference)."""

    model: str
    tensor: str


@dataclass(frozen=True)
class TensorPlan:
    """How one output tensor comes to be. method None: copied from its only source.

    promoted: the type that the inputs promote to. cast: what they are rounded to first.
    table: its rows stand for tokens, aligned to the output's vocabulary.
    rows: keep only that many (an explicitly allowed truncation of vocabularies).
    base_place: where among the sources the file names the base; None: it does not, so it comes last.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    method: str | None
    sources: tuple[Source, ...]
    base: Source | None
    parameters: Mapping[str, Any]
    promoted: str = "float32"
    cast: str | None = None
    table: bool = False
    rows: int | None = None
    base_place: int | None = None

    @property
    def inputs(self) -> tuple[Source, ...]:
        return (*self.sources, *([self.base] if self.base else []))


@dataclass(frozen=True)
class MergePlan:
    """All output tensors in the order of their names, and what was noticed on the way."""

    tensors: tuple[TensorPlan, ...]
    donor: str
    layers: int | None
    warnings: tuple[str, ...] = ()
    compat: bool = False
    seed: int = 0

    def digest(self, identities: Mapping[str, str]) -> str:
        """Names the computation. identities: by model reference, since references are names of the moment."""

        def named(source: Source) -> list[str]:
            return [identities[source.model], source.tensor]

        lines = [
            json.dumps(
                [
                    tensor.name, tensor.shape, tensor.dtype, tensor.method, [named(s) for s in tensor.sources],
                    named(tensor.base) if tensor.base else None, tensor.parameters, tensor.cast, tensor.table,
                    tensor.rows,
                ],
                sort_keys=True,
            )
            for tensor in self.tensors
        ]  # fmt: skip
        used = {tensor.method for tensor in self.tensors if tensor.method}
        seed = self.seed if any(methods()[name].random for name in used) else None
        versions = {name: methods()[name].version for name in sorted(used)}
        facts = json.dumps([ARITHMETIC, versions, self.compat, seed])
        return hashlib.sha256("\n".join([facts, *lines]).encode()).hexdigest()
