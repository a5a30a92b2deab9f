"""The native kernels for merging (csrc/merging.cpp) over flat torch tensors in float32, bfloat16 or float16.

Bits are those of the same expressions in torch; who calls falls back to torch where `available()` is False.
Every function releases the interpreter lock, so threads that each take a block run side by side.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gnomon.kernels import _native

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
CHUNK = 1024
"""Elements that one float64 sum stands for."""
MOST_PARTS = 16
EVERYTHING = (-float("inf"), 1 << 62)
pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Input(ctypes.Structure):
    _fields_ = [("data", pointer), ("kind", integer)]


class _Part(ctypes.Structure):
    _fields_ = [
        ("model", Input), ("weight", real), ("scale", real), ("threshold", real), ("outlier_threshold", real),
        ("last", integer), ("outlier_last", integer), ("drawn", pointer), ("has_cut", integer),
        ("has_outliers", integer), ("has_scale", integer),
    ]  # fmt: skip


SIGNATURES = {
    "gnomon_merge_finite": ([pointer, integer], ctypes.c_int),
    "gnomon_merge_sample": ([pointer, pointer, integer, integer, pointer], None),
    "gnomon_merge_count": ([pointer, pointer, integer, real, real, pointer, pointer], integer),
    "gnomon_merge_equal": ([pointer, pointer, integer, real, integer], integer),
    "gnomon_merge_drop": ([pointer, pointer, integer, pointer, integer, ctypes.c_uint64, pointer, pointer], None),
    "gnomon_merge_gram": ([pointer, pointer, integer, integer, pointer], None),
    "gnomon_merge_sums": ([pointer, integer, pointer], None),
    "gnomon_merge_combine": (
        [pointer, pointer, integer, integer, ctypes.c_int, ctypes.c_int, real, real, ctypes.c_int, pointer, integer],
        None,
    ),
}


@dataclass(frozen=True)
class Part:
    """One model's share of a combination. cut, outliers: (threshold, place of the last equal kept).

    drawn: one bit per element of the block (uint8), None to keep all. scale: None leaves as it is.
    """

    model: Tensor
    weight: float
    cut: tuple[float, int] | None = None
    outliers: tuple[float, int] | None = None
    drawn: Tensor | None = None
    scale: float | None = None


@cache
def _library() -> ctypes.CDLL | None:
    if _native.unavailable_reason() is not None:
        return None
    library = _native.open_library()
    for name, (arguments, result) in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = result
    return library


def available() -> bool:
    return _library() is not None


def takes(tensors: Sequence[Tensor]) -> bool:
    """Whether these flat tensors can be given to the functions below."""
    return available() and len(tensors) <= MOST_PARTS and all(t.dtype in KINDS and t.is_contiguous() for t in tensors)


def _call(name: str, *arguments: object) -> int:
    library = _library()
    if library is None:
        raise RuntimeError("the native kernels are missing; ask available() first")
    return int(getattr(library, name)(*arguments) or 0)


def _input(tensor: Tensor) -> Input:
    return Input(tensor.data_ptr(), KINDS[tensor.dtype])


def _base(tensor: Tensor | None) -> object:
    return ctypes.byref(_input(tensor)) if tensor is not None else None


def finite(tensor: Tensor) -> bool:
    return bool(_call("gnomon_merge_finite", ctypes.byref(_input(tensor)), tensor.numel()))


def sample(base: Tensor, model: Tensor, stride: int) -> Tensor:
    """Every stride-th |model - base|, float32."""
    out = torch.empty(-(-model.numel() // stride))
    _call("gnomon_merge_sample", _base(base), _base(model), model.numel(), stride, out.data_ptr())
    return out


def count(base: Tensor, model: Tensor, low: float, high: float) -> tuple[int, int, int, Tensor]:
    """How many |model - base| are above high, above low, equal to low; and those strictly between."""
    counts, inside = (integer * 3)(), torch.empty(model.numel() + 1)
    found = _call("gnomon_merge_count", _base(base), _base(model), model.numel(), low, high, counts, inside.data_ptr())
    return counts[0], counts[1], counts[2], inside[:found].clone()


def equal(base: Tensor, model: Tensor, threshold: float, nth: int) -> int:
    """The place of the nth (from 1) |model - base| equal to threshold; minus their number when there are fewer."""
    return _call("gnomon_merge_equal", _base(base), _base(model), model.numel(), threshold, nth)


def drop(base: Tensor, model: Tensor, key: tuple[int, int], start: int, below: int) -> tuple[Tensor, Tensor]:
    """Draw for elements start.. of a tensor.

    Returns: (bits, one per element, set where it is kept; [chunks, 2] float64: the magnitudes' sums before and after).
    """
    n = model.numel()
    bits, sums = torch.empty(-(-n // 8), dtype=torch.uint8), torch.empty(-(-n // CHUNK), 2, dtype=torch.float64)
    keys = (ctypes.c_uint64 * 2)(*key)
    _call("gnomon_merge_drop", _base(base), _base(model), n, keys, start, below, bits.data_ptr(), sums.data_ptr())
    return bits, sums


def gram(base: Tensor | None, vectors: Sequence[Tensor]) -> Tensor:
    """[pairs, chunks] float64: sums of the products of each pair i <= j of the vectors (minus the base where given)."""
    n, pairs = vectors[0].numel(), len(vectors) * (len(vectors) + 1) // 2
    sums = torch.empty(pairs, -(-n // CHUNK), dtype=torch.float64)
    inputs = (Input * len(vectors))(*(_input(vector) for vector in vectors))
    _call("gnomon_merge_gram", _base(base), inputs, len(vectors), n, sums.data_ptr())
    return sums


def sums(values: Tensor) -> Tensor:
    """[chunks] float64: the sums of a flat float32 tensor's chunks."""
    out = torch.empty(-(-values.numel() // CHUNK), dtype=torch.float64)
    _call("gnomon_merge_sums", values.data_ptr(), values.numel(), out.data_ptr())
    return out


def combine(
    base: Tensor,
    parts: Sequence[Part],
    *,
    elect: bool,
    divisor: float | None,
    scale: float | None,
    out_dtype: torch.dtype,
) -> Tensor:
    """base + scale * the sum of the parts' weighted task vectors, in float32, rounded once to out_dtype.

    elect: only what agrees with the sign of the sum, which counts as + where it is 0. divisor: None leaves the sum;
    with elect any other value divides by the weights that took part instead.
    """
    out = torch.empty(base.numel(), dtype=out_dtype if out_dtype is torch.bfloat16 else torch.float32)
    laid = (_Part * len(parts))(*(_laid(part) for part in parts))
    _call(
        "gnomon_merge_combine", _base(base), laid, len(parts), base.numel(), elect, divisor is not None,
        1.0 if divisor is None else divisor, 1.0 if scale is None else scale, scale is not None, out.data_ptr(),
        KINDS[out.dtype],
    )  # fmt: skip
    return out


def _laid(part: Part) -> _Part:
    threshold, last = part.cut or EVERYTHING
    outlier_threshold, outlier_last = part.outliers or (float("inf"), -1)
    return _Part(
        _input(part.model), part.weight, 1.0 if part.scale is None else part.scale, threshold, outlier_threshold,
        last, outlier_last, part.drawn.data_ptr() if part.drawn is not None else None, part.cut is not None,
        part.outliers is not None, part.scale is not None,
    )  # fmt: skip
