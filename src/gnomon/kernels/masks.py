"""An attention mask as what the canonical kernel needs: for each query row its text, and its place in that text.

A mask is taken apart into segments (texts that stand in one padded or packed row), so that padding, packing and batch
position leave no trace in the arithmetic: keys lie in blocks counted from their own text's beginning.
Legend: B batch, Q query rows, K keys, S segments, T real query rows, P pages of the longest segment.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gnomon.errors import UnsupportedModel
from gnomon.kernels.batch import PAGE

Span5 = tuple[int, int, int, int, int]


@dataclass(frozen=True)
class AttentionPlan:
    """spans_S5: batch row, first key, number of keys, first query, number of queries. window 0: none."""

    rows_T: Tensor  # int64: which of the B * Q query rows are real, segment after segment
    positions_T: Tensor  # int64: the last key a row sees, counted from its segment's first
    sequences_T: Tensor  # int32: its segment
    tables_SP: Tensor  # int32: pages of each segment
    columns_N: Tensor  # int64: which of the B * K keys lies at each place of the pages
    spans_S5: Tensor  # int64
    window: int


def plan_attention(mask: Tensor | None, causal: bool, batch: int, queries: int, keys: int) -> AttentionPlan:
    """mask: bool [B or 1, 1, Q, K], True where a key is seen. Raises UnsupportedModel for one that is no interval."""
    if mask is None:
        last_Q = torch.arange(queries) if causal else torch.full((queries,), keys - 1)
        spans = [(b, 0, keys, 0, queries) for b in range(batch)]
        return _plan(spans, [last_Q] * batch, queries, keys, 0)
    return _plan_mask(mask[:, 0].expand(batch, queries, keys), queries, keys)


def _plan_mask(seen_BQK: Tensor, queries: int, keys: int) -> AttentionPlan:
    column_K = torch.arange(keys)
    own_Q = torch.arange(keys - queries, keys)  # the key that each query row itself is
    count_BQ = seen_BQK.sum(-1)
    first_BQ = torch.where(seen_BQK, column_K, keys).amin(-1)
    last_BQ = torch.where(seen_BQK, column_K, -1).amax(-1)
    real_BQ = count_BQ > 0
    if not bool((count_BQ == last_BQ - first_BQ + 1)[real_BQ].all()):
        raise _refusal("a row sees keys with gaps between them")
    spans: list[Span5] = []
    lasts, window = [], 0
    for b in range(seen_BQK.shape[0]):
        rows = real_BQ[b].nonzero()[:, 0]
        seen = set(zip(first_BQ[b, rows].tolist(), last_BQ[b, rows].tolist(), strict=True))
        if len(seen) == 1 and bool((rows.diff() == 1).all()):  # no order in time: every row sees the same keys
            start, last = seen.pop()
            spans.append((b, start, last - start + 1, int(rows[0]), len(rows)))
            lasts.append(torch.full((len(rows),), last - start))
            continue
        rows = rows[seen_BQK[b].any(0)[own_Q[rows]]] if keys >= queries else rows  # without padding
        if not len(rows):
            continue
        if not bool((last_BQ[b, rows] == own_Q[rows]).all()):
            raise _refusal("rows see different keys, and not those up to their own")
        alone = (first_BQ[b, rows] == own_Q[rows]).nonzero()[:, 0].tolist()  # a text's first row sees only itself
        bounds = sorted({0, *alone, len(rows)})
        for low, high in pairwise(bounds):
            part = rows[low:high]
            start = int(first_BQ[b, part[0]])
            begun_late = first_BQ[b, part] > start
            widths = set(count_BQ[b, part][begun_late].tolist())
            window = window or max(widths, default=0)
            if widths - {window} or not bool((part.diff() == 1).all()):
                raise _refusal("its sliding window is not the same for every row")
            spans.append((b, start, int(own_Q[part[-1]]) - start + 1, int(part[0]), len(part)))
            lasts.append(own_Q[part] - start)
    return _plan(spans, lasts, queries, keys, window)


def _plan(spans: list[Span5], lasts: list[Tensor], queries: int, keys: int, window: int) -> AttentionPlan:
    most = max((-(-span[2] // PAGE) for span in spans), default=1)
    tables_SP = torch.zeros(len(spans), most, dtype=torch.int32)
    rows, columns, page = [], [], 0
    for index, (b, start, length, row, count) in enumerate(spans):
        pages = -(-length // PAGE)
        tables_SP[index, :pages] = torch.arange(page, page + pages, dtype=torch.int32)
        page += pages
        place = torch.arange(pages * PAGE).clamp(max=length - 1)  # past the end: a key that nobody sees
        columns.append(b * keys + start + place)
        rows.append(b * queries + row + torch.arange(count))
    nothing = torch.zeros(0, dtype=torch.int64)
    counts = torch.tensor([span[4] for span in spans], dtype=torch.int64)
    return AttentionPlan(
        rows_T=torch.cat([nothing, *rows]),
        positions_T=torch.cat([nothing, *lasts]),
        sequences_T=torch.repeat_interleave(torch.arange(len(spans), dtype=torch.int32), counts),
        tables_SP=tables_SP,
        columns_N=torch.cat([nothing, *columns]),
        spans_S5=torch.tensor(spans, dtype=torch.int64).reshape(-1, 5),
        window=window,
    )


def _refusal(why: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"This attention mask has no canonical form: {why}.",
        hint="Causal, bidirectional, padded, packed and sliding-window masks have one.",
    )
