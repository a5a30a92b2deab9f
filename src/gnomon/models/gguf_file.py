"""A GGUF file's metadata and table of contents, read fast: vocabularies of 262k tokens in a fraction of a second.

Only reads; values are plain Python (arrays of numbers: numpy). Every offset and count is checked against the file's
size first, so that a truncated or hostile file is refused before anything heavy. Format: GGUF v2/v3 specification.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.errors import CheckpointError, UnsupportedModel

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
STRING, ARRAY = 8, 9
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 24: ("I8", 1, 1), 25: ("I16", 1, 2),
    26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8), 30: ("BF16", 1, 2),
}  # fmt: skip
"""type number -> (name, numbers in a block, bytes of a block)"""


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: shape in torch's order (outermost first), bytes at [begin, end)."""

    name: str
    shape: tuple[int, ...]
    type_name: str
    begin: int
    end: int


class GgufFile:
    """metadata: key -> value. tensors: name -> where it lies. data: the mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as handle:
                self.data = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}.") from None
        try:
            self._parse()
        except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise CheckpointError(f"{path} is truncated or damaged: {error}.", hint="Fetch it again.") from None

    def _parse(self) -> None:
        magic, version, tensor_count, key_count = struct.unpack_from("<4sIQQ", self.data, 0)
        if magic != b"GGUF":
            raise CheckpointError(f"{self.path} is no GGUF file (it begins with {magic!r}).")
        if version not in (2, 3):
            raise UnsupportedModel(f"{self.path} is GGUF version {version}; versions 2 and 3 are read.")
        self._at = 24
        self._check_count(key_count, 13)
        self.metadata: dict[str, Any] = {}
        for _ in range(key_count):
            key = self._string()
            kind = self._scalar("<I")
            self.metadata[key] = self._value(kind)
        self._check_count(tensor_count, 24)
        entries = [self._tensor_entry() for _ in range(tensor_count)]
        alignment = int(self.metadata.get("general.alignment", 32))
        if alignment <= 0:
            raise CheckpointError(f"{self.path}: general.alignment is {alignment}.")
        start = -(-self._at // alignment) * alignment
        self.tensors = {entry[0]: self._place(start, *entry) for entry in entries}

    def _tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        dimensions = self._scalar("<I")
        if dimensions > 4:
            raise CheckpointError(f"{self.path}: tensor `{name}` has {dimensions} dimensions.")
        shape = tuple(self._scalar("<Q") for _ in range(dimensions))[::-1]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _place(self, start: int, name: str, shape: tuple[int, ...], kind: int, offset: int) -> GgufTensor:
        if kind not in BLOCKS:
            raise UnsupportedModel(f"{self.path}: tensor `{name}` has the unknown block type {kind}.")
        type_name, numbers, size = BLOCKS[kind]
        count = 1
        for extent in shape:
            count *= extent
        if count % numbers or (shape and shape[-1] % numbers):
            raise CheckpointError(f"{self.path}: tensor `{name}` {shape} is not whole blocks of {numbers}.")
        begin = start + offset
        end = begin + count // numbers * size
        if end > len(self.data):
            raise CheckpointError(
                f"{self.path} is truncated: tensor `{name}` ends at byte {end}, the file has {len(self.data)}.",
                hint="Fetch it again.",
            )
        return GgufTensor(name, shape, type_name, begin, end)

    def _check_count(self, count: int, least_bytes: int) -> None:
        if count * least_bytes > len(self.data):
            raise CheckpointError(f"{self.path} is truncated or damaged: it claims {count} entries.")

    def _scalar(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self._at)
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = self._scalar("<Q")
        raw = self.data[self._at : self._at + length]
        if len(raw) != length:
            raise CheckpointError(f"{self.path} is truncated: a text of {length} bytes is cut off.")
        self._at += length
        return raw.decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._string()
        if kind != ARRAY:
            raise CheckpointError(f"{self.path}: metadata of the unknown type {kind}.")
        inner, count = self._scalar("<I"), self._scalar("<Q")
        if inner == STRING:
            self._check_count(count, 8)
            return self._strings(count)
        if inner == ARRAY:
            self._check_count(count, 12)
            return [self._value(ARRAY) for _ in range(count)]
        if inner not in SCALARS:
            raise CheckpointError(f"{self.path}: an array of the unknown type {inner}.")
        form = np.dtype(SCALARS[inner].replace("?", "b1"))
        self._check_count(count, form.itemsize)
        values = np.frombuffer(self.data, form, count, self._at)
        self._at += count * form.itemsize
        return values

    def _strings(self, count: int) -> list[str]:
        """The hot loop: one pass over the bytes, no calls but unpack and decode."""
        data, at, texts = self.data, self._at, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            (length,) = unpack(data, at)
            end = at + 8 + length
            texts.append(data[at + 8 : end].decode("utf-8"))
            at = end
        if at > len(data):
            raise CheckpointError(f"{self.path} is truncated inside an array of {count} texts.")
        self._at = at
        return texts
