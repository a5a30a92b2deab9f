"""The canonical operators' inner loops in Triton: one tile shape per dtype for any number of rows, no split of a sum.

Products are persistent: programs walk over tiles of a fixed shape, each tile adds its K blocks in order in float32.
Attention walks over absolute blocks of PAGE keys in order and rescales at every one; a masked block multiplies by one
and adds zero, so neither the rows beside a row nor how a text was cut can change its bits. Nothing is autotuned.
With TRITON_INTERPRET=1 everything runs on the CPU: that is how the tests run it.
Legend: M, T rows, N outputs, K inputs, H heads of one key-value head, G key-value heads, D head size, P pages.
"""

from __future__ import annotations

import triton
import triton.language as tl

FLOOR = tl.constexpr(-1e30)
"""Below every score, and finite: exp(FLOOR - FLOOR) is 1 where minus infinity would give no number."""


@triton.jit
def linear_kernel(
    x, w, bias, y, M, N, K,
    PROGRAMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BIASED: tl.constexpr,
    WIDEN: tl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K] of one dtype -> y [M, N] float32. WIDEN: the interpreter multiplies no bfloat16."""
    across = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(M, BLOCK_M) * across
    for tile in range(tl.program_id(0), tiles, PROGRAMS):
        rows = (tile // across) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = (tile % across) * BLOCK_N + tl.arange(0, BLOCK_N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            inner = k + tl.arange(0, BLOCK_K)
            left = tl.load(
                x + rows[:, None].to(tl.int64) * K + inner[None, :],
                mask=(rows[:, None] < M) & (inner[None, :] < K), other=0.0,
            )  # fmt: skip
            right = tl.load(
                w + columns[None, :].to(tl.int64) * K + inner[:, None],
                mask=(columns[None, :] < N) & (inner[:, None] < K), other=0.0,
            )  # fmt: skip
            if WIDEN:
                left, right = left.to(tl.float32), right.to(tl.float32)
            total = tl.dot(left, right, total, input_precision="ieee")
        if BIASED:
            total += tl.load(bias + columns, mask=columns < N, other=0.0)[None, :]
        place = y + rows[:, None].to(tl.int64) * N + columns[None, :]
        tl.store(place, total, mask=(rows[:, None] < M) & (columns[None, :] < N))


@triton.jit
def rms_norm_kernel(x, weight, y, K, eps, BLOCK: tl.constexpr):
    """One row to a program; BLOCK is the power of two from K on, so the sum's tree is the shape's own."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    values = tl.load(x + row * K + columns, mask=columns < K, other=0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, axis=0) / K + eps)
    weights = tl.load(weight + columns, mask=columns < K, other=0.0)
    tl.store(y + row * K + columns, (values * scale) * weights, mask=columns < K)


@triton.jit
def log_softmax_kernel(x, y, V, BLOCK: tl.constexpr):
    """One row to a program: the exact maximum, then sums of fixed blocks added in order."""
    row = tl.program_id(0).to(tl.int64) * V
    columns = tl.arange(0, BLOCK)
    greatest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in range(0, V, BLOCK):
        part = tl.load(x + row + start + columns, mask=start + columns < V, other=float("-inf"))
        greatest = tl.maximum(greatest, part)
    top = tl.max(greatest, axis=0)
    total = 0.0
    for start in range(0, V, BLOCK):
        part = tl.load(x + row + start + columns, mask=start + columns < V, other=float("-inf"))
        total += tl.sum(tl.exp(part - top), axis=0)
    normaliser = top + tl.log(total)
    for start in range(0, V, BLOCK):
        inside = start + columns < V
        part = tl.load(x + row + start + columns, mask=inside, other=0.0)
        tl.store(y + row + start + columns, part - normaliser, mask=inside)


@triton.jit
def attention_kernel(
    q, keys, values, tables, positions, tile_row, tile_count, tile_sequence, out, scale, window, softcap,
    G, P,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """One tile of up to ROWS rows of one sequence, one key-value head: PAIRS >= ROWS * H pairs of row and head.

    q, out: [T, G * H, D]; keys, values: [pages, G, PAGE, D]; tables: [S, P]; positions: [T].
    """
    tile, group = tl.program_id(0), tl.program_id(1)
    first_row, count = tl.load(tile_row + tile), tl.load(tile_count + tile)
    table = tables + tl.load(tile_sequence + tile).to(tl.int64) * P
    pair = tl.arange(0, PAIRS)
    row, head = pair // H, pair % H
    real = (row < count) & (row < ROWS)
    position = tl.load(positions + first_row + row, mask=real, other=0).to(tl.int32)
    channel = tl.arange(0, WIDTH)
    place = ((first_row + row).to(tl.int64) * (G * H) + group * H + head)[:, None] * D + channel[None, :]
    seen_channel = channel[None, :] < D
    query = tl.load(q + place, mask=real[:, None] & seen_channel, other=0.0)
    last = tl.max(tl.where(real, position, 0), axis=0)
    begin = 0
    if WINDOWED:
        oldest = tl.min(tl.where(real, position, 2147483647), axis=0) - window + 1
        begin = tl.maximum(oldest, 0) // PAGE
    top = tl.full((PAIRS,), FLOOR, tl.float32)
    total = tl.zeros((PAIRS,), tl.float32)
    mixed = tl.zeros((PAIRS, WIDTH), tl.float32)
    offset = tl.arange(0, PAGE)
    for block in range(begin, last // PAGE + 1):
        page = tl.load(table + block).to(tl.int64)
        base = (page * G + group) * PAGE * D
        key_position = block * PAGE + offset
        written = key_position <= last
        key = tl.load(
            keys + base + offset[None, :] * D + channel[:, None],
            mask=written[None, :] & (channel[:, None] < D), other=0.0,
        )  # fmt: skip
        scores = tl.dot(query, key, input_precision="ieee") * scale
        if CAPPED:
            scores = softcap * (1.0 - 2.0 / (1.0 + tl.exp(2.0 * (scores / softcap))))
        seen = key_position[None, :] <= position[:, None]
        if WINDOWED:
            seen = seen & (key_position[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(top - higher)
        value = tl.load(
            values + base + offset[:, None] * D + channel[None, :],
            mask=written[:, None] & seen_channel, other=0.0,
        )  # fmt: skip
        total = total * shrink + tl.sum(weights, axis=1)
        mixed = mixed * shrink[:, None] + tl.dot(weights, value, input_precision="ieee")
        top = higher
    total = tl.where(real, total, 1.0)
    tl.store(out + place, mixed / total[:, None], mask=real[:, None] & seen_channel)
