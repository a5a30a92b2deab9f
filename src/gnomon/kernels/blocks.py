"""Quantised weights taken apart: unsigned integers, scales and minima, w = scale (q - zero) + minimum.

GGUF's block formats (llama.cpp's ggml-quants), and our own int8: symmetric, one float32 scale per output and 64 inputs.
Nothing is rounded here: a file's numbers stay what they are. Legend: N outputs, K inputs, G = K / inputs of a scale.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gnomon.errors import UnsupportedModel

Array = np.ndarray[Any, np.dtype[Any]]
INT8_GROUP = 64


@dataclass(frozen=True)
class Parts:
    """q: uint8 [N, K]. scales, minima: float16 or float32 [N, G], as the kind's kernel reads them."""

    q: Array
    scales: Array
    minima: Array | None = None


@dataclass(frozen=True)
class BlockType:
    """A format the kernels run. kind: its number in csrc/quantized.h."""

    kind: int
    inputs: int
    size: int
    read: Callable[[Array], Parts]


def int8_parts(weight: Array) -> Parts:
    """Round a float32 [N, K] to int8: scale = max|w| / 127 per group of 64, q = round-half-even(w / scale) + 128."""
    n, k = weight.shape
    groups = -(-k // INT8_GROUP)
    padded = np.zeros((n, groups * INT8_GROUP), np.float32)
    padded[:, :k] = weight
    blocks = padded.reshape(n, groups, INT8_GROUP)
    scales = np.abs(blocks).max(axis=2) / np.float32(127)
    divisor = np.where(scales > 0, scales, np.float32(1))[..., None]
    q = (np.rint(blocks / divisor) + 128).astype(np.uint8)
    return Parts(q.reshape(n, -1)[:, :k].copy(), scales.astype(np.float32))


def parts_of(rows: Array, type_name: str) -> Parts:
    """A tensor's blocks, uint8 [N, bytes of a row], taken apart. Raises UnsupportedModel for another format."""
    known = block_type(type_name)
    blocks = np.ascontiguousarray(rows).reshape(rows.shape[0], -1, known.size)
    return known.read(blocks)


def block_type(type_name: str) -> BlockType:
    if type_name not in BLOCK_TYPES:
        raise UnsupportedModel(
            f"The gguf profile does not run {type_name} blocks (it runs {', '.join(BLOCK_TYPES)}).",
            hint="Load with profile='int8', 'bf16' or 'fp32'.",
        )
    return BLOCK_TYPES[type_name]


def _halves(blocks: Array, at: int) -> Array:
    """The half at byte `at` of every block -> float16 [N, blocks]."""
    return np.ascontiguousarray(blocks[..., at : at + 2]).view(np.float16)[..., 0]


def _nibbles(packed: Array) -> Array:
    """[..., 16] bytes -> [..., 32]: the low nibbles, then the high ones."""
    return np.concatenate([packed & 15, packed >> 4], axis=-1)


def _fifth_bits(packed: Array) -> Array:
    """[..., 4] bytes -> [..., 32]: 16 where the bit is set."""
    return np.unpackbits(packed, axis=-1, bitorder="little") << 4


def _flat(q: Array) -> Array:
    return q.reshape(q.shape[0], -1)


def _q4_0(b: Array) -> Parts:
    return Parts(_flat(_nibbles(b[..., 2:])), _halves(b, 0))


def _q4_1(b: Array) -> Parts:
    return Parts(_flat(_nibbles(b[..., 4:])), _halves(b, 0), _halves(b, 2))


def _q5_0(b: Array) -> Parts:
    return Parts(_flat(_nibbles(b[..., 6:]) | _fifth_bits(b[..., 2:6])), _halves(b, 0))


def _q5_1(b: Array) -> Parts:
    return Parts(_flat(_nibbles(b[..., 8:]) | _fifth_bits(b[..., 4:8])), _halves(b, 0), _halves(b, 2))


def _q8_0(b: Array) -> Parts:
    return Parts(_flat(b[..., 2:] ^ 128), _halves(b, 0))  # two's complement + 128


def _k_scales(b: Array) -> tuple[Array, Array]:
    """Scales and minima of a super-block's eight groups: 6-bit factors of two halves. Exact in float32."""
    d, least = _halves(b, 0).astype(np.float32), _halves(b, 2).astype(np.float32)
    s = b[..., 4:16]
    low, middle, high = s[..., :4], s[..., 4:8], s[..., 8:]
    scale = np.concatenate([low & 63, (high & 15) | ((low >> 6) << 4)], axis=-1).astype(np.float32)
    minimum = np.concatenate([middle & 63, (high >> 4) | ((middle >> 6) << 4)], axis=-1).astype(np.float32)
    return _flat(d[..., None] * scale), _flat(-(least[..., None] * minimum))


def _q4_k(b: Array) -> Parts:
    scales, minima = _k_scales(b)
    return Parts(_flat(_nibbles(b[..., 16:].reshape(*b.shape[:2], 4, 32))), scales, minima)


def _q5_k(b: Array) -> Parts:
    scales, minima = _k_scales(b)
    low = _nibbles(b[..., 48:].reshape(*b.shape[:2], 4, 32)).reshape(*b.shape[:2], 8, 32)
    bits = b[..., None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    return Parts(_flat(low | (bits << 4)), scales, minima)


def _q6_k(b: Array) -> Parts:
    low = _nibbles(b[..., :128].reshape(*b.shape[:2], 2, 64)).reshape(*b.shape[:2], 2, 4, 32)
    shifts = np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    high = b[..., 128:192].reshape(*b.shape[:2], 2, 1, 32) >> shifts & 3
    factors = np.ascontiguousarray(b[..., 192:208]).view(np.int8).astype(np.float32)
    return Parts(_flat(low | (high << 4)), _flat(_halves(b, 208).astype(np.float32)[..., None] * factors))


INT8_KIND = 2
BLOCK_TYPES = {
    "Q4_0": BlockType(3, 32, 18, _q4_0),
    "Q4_1": BlockType(4, 32, 20, _q4_1),
    "Q5_0": BlockType(5, 32, 22, _q5_0),
    "Q5_1": BlockType(6, 32, 24, _q5_1),
    "Q8_0": BlockType(7, 32, 34, _q8_0),
    "Q4_K": BlockType(8, 256, 144, _q4_k),
    "Q5_K": BlockType(9, 256, 176, _q5_k),
    "Q6_K": BlockType(10, 256, 210, _q6_k),
}
