"""Operator probes of the certificate: does this machine's build of the operators keep its promises?

Every probe compares bytes: rows alone, in company, at other places; one thread and several; attention whole and in
pieces. `golden_digest` hashes results on fixed inputs: equal digests mean equal operators, on whatever machine.
Legend: M rows, K inputs, N outputs, D head size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.operators import LinearWeight, Operators

ROWS = (1, 2, 3, 5, 8, 17, 33)
SHAPES = ((96, 64), (130, 192))
HEADS, KV_HEADS, D = 6, 2, 32


@dataclass(frozen=True)
class Probe:
    """One self-test. compared: how many comparisons of bytes it made; detail: the first difference, or empty."""

    name: str
    passed: bool
    compared: int
    detail: str = ""


def probe(name: str, comparisons: Iterator[tuple[str, bool]]) -> Probe:
    """Run a probe's comparisons; the first that fails names the defect."""
    compared = 0
    for what, same in comparisons:
        compared += 1
        if not same:
            return Probe(name, False, compared, what)
    return Probe(name, compared > 0, compared, "" if compared else "nothing was compared")


def probe_operators(operators: Operators) -> list[Probe]:
    """All operator probes, in some milliseconds."""
    return [
        probe("rows of a product", _rows(operators)),
        probe("threads", _threads(operators)),
        probe("the caller's rounding mode", _modes(operators)),
        probe("attention in pieces", _attention(operators)),
        probe("residual norm in two steps", _norm(operators)),
    ]


def golden_digest(operators: Operators) -> str:
    """sha256 over every operator's results on fixed inputs."""
    digest = hashlib.sha256()
    for shape in SHAPES:
        digest.update(operators.linear(_numbers(17, shape[1]), _weight(operators, shape)).cpu().numpy().tobytes())
    x = _numbers(9, 96)
    digest.update(operators.rms_norm(x, _numbers(1, 96)[0], 1e-6).cpu().numpy().tobytes())
    digest.update(operators.silu_mul(x).cpu().numpy().tobytes())
    digest.update(operators.gelu_mul(x).cpu().numpy().tobytes())
    digest.update(_attend(operators, [150]).cpu().numpy().tobytes())
    return digest.hexdigest()


def _numbers(rows: int, columns: int) -> Tensor:
    """Fixed numbers of mixed sign and size, the same on every machine: integer arithmetic, divided exactly."""
    index = np.arange(rows * columns, dtype=np.uint64)
    mixed = (index * np.uint64(2654435761) + np.uint64(12345)) % np.uint64(65536)
    values = (mixed.astype(np.float32) - np.float32(32768)) / np.float32(16384)
    return torch.from_numpy(values.reshape(rows, columns))


def _weight(operators: Operators, shape: tuple[int, int]) -> LinearWeight:
    """Quantised profiles get their int8 or float form: the file's own blocks are probed by the whole model."""
    return operators.linear_weight(_numbers(*shape))


def _rows(operators: Operators) -> Iterator[tuple[str, bool]]:
    for shape in SHAPES:
        weight, x = _weight(operators, shape), _numbers(65, shape[1])
        whole = operators.linear(x, weight)
        for rows in ROWS:
            for start in (0, 7, 65 - rows):
                part = operators.linear(x[start : start + rows].clone(), weight)
                same = torch.equal(part, whole[start : start + rows])
                yield f"{rows} rows from {start} of a {shape} product", same
        loud = x.clone()
        loud[1::2] *= 1e4
        yield f"loud neighbours of a {shape} product", torch.equal(operators.linear(loud, weight)[::2], whole[::2])


def _threads(operators: Operators) -> Iterator[tuple[str, bool]]:
    """A profile whose bits depend on the thread count says so in its fingerprint, and is compared with itself."""
    weight, x = _weight(operators, SHAPES[1]), _numbers(65, SHAPES[1][1])
    whole = operators.linear(x, weight)
    own = operators.threads
    counts = (1, own + 1) if operators.kernel == "native" else (own,)
    try:
        for count in counts:
            operators.use_threads(count)
            yield f"{count} threads instead of {own}", torch.equal(operators.linear(x, weight), whole)
    finally:
        operators.use_threads(own)


def _modes(operators: Operators) -> Iterator[tuple[str, bool]]:
    """Whether small numbers are flushed to zero is the caller's setting: it must not reach the native kernels."""
    weight, x = _weight(operators, SHAPES[0]), _numbers(5, SHAPES[0][1])
    small = x * 2.0**-120 * 2.0**-12
    plain = operators.linear(small, weight)
    if operators.kernel != "native" or not torch.set_flush_denormal(True):
        yield "no mode to change", True
        return
    try:
        flushed = operators.linear(small, weight)
    finally:
        torch.set_flush_denormal(False)
    yield "products of denormals", torch.equal(flushed, plain)


def _attend(operators: Operators, pieces: list[int]) -> Tensor:
    """Attention of one 150-token text, computed in pieces."""
    total = 150
    query, key = _numbers(total, HEADS * D).view(-1, HEADS, D), _numbers(total, KV_HEADS * D).view(-1, KV_HEADS, D)
    shape = (4, KV_HEADS, PAGE, D)
    zeros = getattr(operators, "zeros", torch.zeros)
    keys, values = zeros(shape).fill_(torch.nan), zeros(shape).fill_(torch.nan)
    out, start = [], 0
    for size in pieces:
        batch = RaggedBatch.build([Span(0, [0] * size, start, [2, 0, 3])])
        part = slice(start, start + size)
        operators.write_pages(key[part].contiguous(), (key[part] * 2).contiguous(), keys, values, batch)
        out.append(operators.attention(query[part].contiguous(), keys, values, batch, scale=0.2))
        start += size
    return torch.cat(out)


def _attention(operators: Operators) -> Iterator[tuple[str, bool]]:
    whole = _attend(operators, [150])
    for pieces in ([1] * 150, [PAGE, PAGE, 22], [PAGE - 1, 2, 85], [149, 1]):
        yield f"attention in {len(pieces)} pieces", torch.equal(_attend(operators, pieces), whole)


def _norm(operators: Operators) -> Iterator[tuple[str, bool]]:
    x, residual, weight = _numbers(9, 96), _numbers(9, 96) * 3, _numbers(1, 96)[0]
    normed, total = operators.add_rms_norm(x, residual, weight, 1e-6)
    yield "the sum", torch.equal(total.cpu(), x + residual)
    yield "the norm of the sum", torch.equal(normed, operators.rms_norm(x + residual, weight, 1e-6))
