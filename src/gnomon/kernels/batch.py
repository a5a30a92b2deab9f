"""One ragged batch: the packed tokens of one engine step and where their keys and values live.

Legend: T packed tokens, S sequences, P most pages of one sequence. A sequence's tokens are adjacent rows, in order;
its page table lists the pages that hold positions [0, PAGE), [PAGE, 2 PAGE), ... Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gnomon.kernels.side import SidePath, SideRows, grouped

PAGE = 64
"""Tokens in one key-value page, and keys in one attention block: the same number, part of every numeric profile."""


@dataclass(frozen=True)
class Span:
    """Consecutive new tokens of one sequence in one step.

    start: absolute position of the first token. pages: page numbers covering [0, start + len(token_ids)).
    wants: "none" | "last" | "all" rows whose logits are needed. sides: patches that run beside the weights, in order.
    options: the request's word to its runner.
    """

    sequence: int
    token_ids: list[int]
    start: int
    pages: list[int]
    wants: str = "last"
    sides: tuple[SidePath, ...] = ()
    options: Any = None

    @property
    def end(self) -> int:
        return self.start + len(self.token_ids)


@dataclass(frozen=True)
class RaggedBatch:
    """Tensors of one step, built once per step from its spans."""

    spans: list[Span]
    token_ids_T: Tensor  # int64
    positions_T: Tensor  # int64, absolute
    slots_T: Tensor  # int64: page * PAGE + offset, where each row's key and value are written
    sequences_T: Tensor  # int32: which sequence (row of page_tables_SP) each token belongs to
    starts_S: Tensor  # int32 [S + 1]: rows of sequence s are starts[s]..starts[s + 1]
    contexts_S: Tensor  # int32: keys of sequence s after this step's writes
    page_tables_SP: Tensor  # int32, padded with 0 (never read)
    wanted_rows_R: Tensor  # int64: rows whose logits are needed, in span order
    wanted_counts: list[int] = field(default_factory=list)  # per span
    side_rows: list[SideRows] = field(default_factory=list)
    wanted_side_rows: list[SideRows] = field(default_factory=list)  # of the wanted rows

    @classmethod
    def build(cls, spans: list[Span]) -> RaggedBatch:
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        starts = [0]
        wanted: list[int] = []
        counts: list[int] = []
        most = max(len(span.pages) for span in spans)
        tables = torch.zeros((len(spans), most), dtype=torch.int32)
        for index, span in enumerate(spans):
            first = starts[-1]
            count = len(span.token_ids)
            tokens += span.token_ids
            positions += range(span.start, span.end)
            slots += [span.pages[p // PAGE] * PAGE + p % PAGE for p in range(span.start, span.end)]
            starts.append(first + count)
            tables[index, : len(span.pages)] = torch.tensor(span.pages, dtype=torch.int32)
            rows = {"none": [], "last": [first + count - 1], "all": list(range(first, first + count))}[span.wants]
            wanted += rows
            counts.append(len(rows))
        return cls(
            spans=spans,
            token_ids_T=torch.tensor(tokens, dtype=torch.int64),
            positions_T=torch.tensor(positions, dtype=torch.int64),
            slots_T=torch.tensor(slots, dtype=torch.int64),
            sequences_T=torch.repeat_interleave(
                torch.arange(len(spans), dtype=torch.int32), torch.tensor([len(span.token_ids) for span in spans])
            ),
            starts_S=torch.tensor(starts, dtype=torch.int32),
            contexts_S=torch.tensor([span.end for span in spans], dtype=torch.int32),
            page_tables_SP=tables,
            wanted_rows_R=torch.tensor(wanted, dtype=torch.int64),
            wanted_counts=counts,
            side_rows=grouped([(len(span.token_ids), span.sides) for span in spans]),
            wanted_side_rows=grouped([(count, span.sides) for count, span in zip(counts, spans, strict=True)]),
        )
