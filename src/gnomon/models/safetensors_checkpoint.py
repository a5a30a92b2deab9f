"""A model directory in Hugging Face layout: config.json and safetensors files, one or sharded.

The header is read and validated here, so that a truncated or hostile file is refused before anything is mapped; the
data is memory-mapped, each tensor a view until it is used.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import CheckpointError, UnsupportedModel
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.models.tokenizer import Tokenizer

LARGEST_HEADER = 100 << 20
HASH_BYTES = 4 << 20
TYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
    "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
}  # fmt: skip
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class DirectoryCheckpoint(Checkpoint):
    """config.json + tokenizer files + model*.safetensors."""

    def __init__(self, path: Path, reference: str | None = None) -> None:
        self.path = self.folder = path
        self.reference = reference or str(path)
        self.name = path.resolve().name
        self.config = read_json(path / "config.json")
        generation = path / "generation_config.json"
        self.generation_config = read_json(generation) if generation.exists() else {}
        self.chat_template = read_chat_template(path)
        self.files = _weight_files(path)
        self._stored: dict[str, _Stored] = {}
        for file in self.files:
            self._stored |= read_header(file)
        _check_index(path, self._stored)
        self._maps: dict[Path, mmap.mmap] = {}
        self._handles: dict[Path, int] = {}

    def info(self, name: str) -> TensorInfo:
        stored = self._stored[name]
        return TensorInfo(name, stored.shape, TYPES[stored.dtype])

    def __getitem__(self, name: str) -> Tensor:
        import torch

        stored = self._stored[name]
        dtype = getattr(torch, TYPES[stored.dtype])
        if stored.begin == stored.end:
            return torch.empty(stored.shape, dtype=dtype)
        data = memoryview(self._map(stored.file))[stored.begin : stored.end]
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(stored.shape)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        import torch

        stored = self._stored[name]
        dtype = getattr(torch, TYPES[stored.dtype])
        size = torch.empty(0, dtype=dtype).element_size()

        def read(start: int, stop: int) -> Tensor:
            found = torch.empty(stop - start, dtype=dtype)
            view, place = memoryview(found.view(torch.uint8).numpy().data), stored.begin + start * size
            while len(view):
                count = os.preadv(self._handle(stored.file), [view], place)  # opened again after a close
                if count == 0:
                    raise CheckpointError(f"{stored.file} became shorter while it was read.")
                view, place = view[count:], place + count
            return found

        return read

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def identity(self) -> str:
        return identity.cached(self.files, self._compute_identity)

    def _compute_identity(self) -> str:
        def digest(stored: _Stored) -> str:
            # read, not mapped: hashing a model must not make all of it resident
            found, place = hashlib.sha256(), stored.begin
            while place < stored.end:
                part = os.pread(self._handle(stored.file), min(HASH_BYTES, stored.end - place), place)
                if not part:
                    raise CheckpointError(f"{stored.file} became shorter while it was read.")
                found.update(part)
                place += len(part)
            return found.hexdigest()

        return identity.of_tensors((n, TYPES[s.dtype], s.shape, digest(s)) for n, s in self._stored.items())

    def tokenizer(self) -> Tokenizer:
        from gnomon.models.tokenizer import Tokenizer

        if not (self.folder / "tokenizer.json").exists():
            raise CheckpointError(f"{self.reference} has no tokenizer.json.", hint="Copy the base model's beside it.")
        return Tokenizer.from_directory(self.folder)

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as handle:
                # A private writable map: torch needs writable memory, and nothing reaches the file.
                self._maps[file] = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_COPY)
        return self._maps[file]

    def _handle(self, file: Path) -> int:
        if file not in self._handles:
            self._handles[file] = os.open(file, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
        return self._handles[file]

    def close(self) -> None:
        self._maps.clear()  # tensors that are still views keep their map alive
        while self._handles:
            os.close(self._handles.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_handles"):
            self.close()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object file. Raises CheckpointError naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing.", hint="Is this a model directory in Hugging Face layout?") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object.")
    return content


def read_header(file: Path) -> dict[str, _Stored]:
    """A safetensors file's table of contents, checked against the file's size."""
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or not 0 < length <= min(LARGEST_HEADER, size - 8):
            raise CheckpointError(f"{file} is truncated or no safetensors file ({size} bytes, header of {length}).")
        try:
            header = json.loads(handle.read(length))
        except ValueError as error:
            raise CheckpointError(f"{file}: the header is damaged: {error}.") from None
    stored: dict[str, _Stored] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        if entry["dtype"] not in TYPES:
            raise UnsupportedModel(f"{file}: tensor `{name}` has the unknown type {entry['dtype']}.")
        expected = SIZES.get(entry["dtype"], 1)
        for extent in entry["shape"]:
            expected *= extent
        if not 0 <= begin <= end or end - begin != expected:
            raise CheckpointError(f"{file}: tensor `{name}` has {end - begin} bytes, its shape needs {expected}.")
        if 8 + length + end > size:
            raise CheckpointError(
                f"{file} is truncated: tensor `{name}` ends at byte {8 + length + end}, the file has {size}.",
                hint="Fetch it again.",
            )
        stored[name] = _Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + begin, 8 + length + end)
    return stored


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(read_json(index).get("weight_map", {}).values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{index}: the shard name `{name}` leads out of the directory.")
            if not (path / name).exists():
                raise CheckpointError(f"{path} lacks the shard {name} that its index names.", hint="Fetch it again.")
        return [path / name for name in names]
    files = sorted(path.glob("*.safetensors"))
    single = path / "model.safetensors"
    files = [single] if single.exists() else [file for file in files if not file.name.startswith("adapter_")]
    if not files:
        raise CheckpointError(f"{path} holds no safetensors weights.")
    return files


def _check_index(path: Path, stored: dict[str, _Stored]) -> None:
    index = path / "model.safetensors.index.json"
    if index.exists():
        for name, file in read_json(index)["weight_map"].items():
            if name not in stored or stored[name].file.name != file:
                raise CheckpointError(f"{path}: the index places `{name}` in {file}, where it is not.")


def read_chat_template(path: Path) -> str | None:
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    config = path / "tokenizer_config.json"
    found = read_json(config).get("chat_template") if config.exists() else None
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
