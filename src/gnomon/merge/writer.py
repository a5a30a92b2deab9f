"""Writing a merge to a model directory: streamed, bounded, resumable, atomic.

Tensors go to their final place in preallocated safetensors shards of `OUT.partial/`, block by block; a journal line per
finished tensor lets a later run go on after a kill; the directory gets its final name when all of it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gnomon.errors import MergeError
from gnomon.merge.budget import Budget, parse_bytes
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.parallel import ordered_map
from gnomon.models import identity
from gnomon.models.safetensors_checkpoint import TYPES
from gnomon.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.progress import Bar

SHARD_BYTES = 5_000_000_000
JOURNAL = "journal.jsonl"
RECORD = "gnomon_merge.json"
CODES = {name: code for code, name in TYPES.items()}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model",
)  # fmt: skip
JOINED_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""Those of them that stay true when the vocabulary grows."""
SMALL_BLOCKS = 4
"""Tensors of fewer blocks are computed side by side; larger ones one after another, each on all threads."""


@dataclass(frozen=True)
class Slot:
    """Where an output tensor goes."""

    name: str
    file: str
    begin: int
    size: int


@dataclass(frozen=True)
class Shard:
    """One output file: its header's bytes, and its whole length."""

    file: str
    header: bytes
    length: int


@dataclass(frozen=True)
class Written:
    """What a run did."""

    path: Path
    identity: str
    tensors: int
    resumed: int
    bytes: int
    seconds: float
    files: Mapping[str, str]


def write(
    merged: MergedCheckpoint,
    out: Path,
    *,
    max_memory: int | str | None = None,
    shard_bytes: int | str = SHARD_BYTES,
    overwrite: bool = False,
    copy_tokenizer: bool = True,
) -> Written:
    """Write the merge to `out`; an interrupted run is continued, a finished one is recognised.

    Raises MergeError when `out` holds something else, memory does not suffice, or the disk is full.
    """
    started = time.monotonic()
    name = merged.identity
    limit = parse_bytes(max_memory, "max_memory") if max_memory is not None else None
    budget = Budget.of(merged, limit)
    if (finished := _finished(out, name)) is not None:
        return finished
    if out.exists() and not overwrite and any(out.iterdir() if out.is_dir() else [out]):
        raise MergeError(f"{out} already exists and is not this merge.", hint="Choose another path, or --overwrite.")
    shards, slots = lay_out(merged, parse_bytes(shard_bytes, "out_shard_size"), name)
    partial = out.parent / f"{out.name}.partial"
    try:
        done = _prepare(partial, name, shards, slots)
        _compute(merged, partial, slots, done, budget.threads)
        files = _finish(merged, partial, shards, slots, done, name, copy_tokenizer)
        _rename(partial, out)
    except OSError as error:
        if error.errno == 28:
            raise MergeError(
                f"The disk of {out.parent.resolve()} is full; {out} was not made.",
                hint="Free some space and run the same command again: it goes on where it stopped.",
            ) from None
        raise
    total = sum(slot.size for slot in slots)
    return Written(out, name, len(slots), done.resumed, total, time.monotonic() - started, files)


def lay_out(merged: MergedCheckpoint, shard_bytes: int, name: str) -> tuple[list[Shard], list[Slot]]:
    """The output files, and every tensor's place; depends on the plan and the shard size alone."""
    groups: list[list[tuple[str, int]]] = [[]]
    filled = 0
    for tensor in merged:
        info = merged.info(tensor)
        size = torch.Size(info.shape).numel() * torch.empty(0, dtype=getattr(torch, info.dtype)).element_size()
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append((tensor, size))
        filled += size
    shards, slots = [], []
    for number, group in enumerate(groups, start=1):
        file = "model.safetensors" if len(groups) == 1 else f"model-{number:05}-of-{len(groups):05}.safetensors"
        header: dict[str, Any] = {"__metadata__": {"format": "pt", "gnomon_identity": name}}
        place = 0
        for tensor, size in group:
            info = merged.info(tensor)
            header[tensor] = {
                "dtype": CODES[info.dtype], "shape": list(info.shape), "data_offsets": [place, place + size],
            }  # fmt: skip
            place += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        begin = 8 + len(text)
        for tensor, size in group:
            slots.append(Slot(tensor, file, begin + header[tensor]["data_offsets"][0], size))
        shards.append(Shard(file, len(text).to_bytes(8, "little") + text, begin + place))
    return shards, slots


def write_tensors(
    merged: MergedCheckpoint, folder: Path, shards: Sequence[Shard], slots: Sequence[Slot], *, threads: int
) -> None:
    """All tensors into a folder, from the beginning."""
    stamp = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
    shutil.rmtree(folder, ignore_errors=True)
    _compute(merged, folder, slots, _prepare(folder, stamp, shards, slots), threads)


class _Done:
    """The journal: which tensors are finished, with the sha256 of their bytes."""

    def __init__(self, path: Path, digests: dict[str, str]) -> None:
        self.digests = digests
        self.resumed = len(digests)
        self._file = path.open("a", encoding="utf-8")
        self._lock = threading.Lock()

    def add(self, tensor: str, digest: str) -> None:
        with self._lock:
            self.digests[tensor] = digest
            self._file.write(json.dumps({"tensor": tensor, "sha256": digest}) + "\n")
            self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finished(out: Path, name: str) -> Written | None:
    """What an earlier, complete run of the same merge left."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if record.get("identity") != name:
        return None
    return Written(out, name, record["tensors"], record["tensors"], record["bytes"], 0.0, record["files"])


def _prepare(partial: Path, name: str, shards: Sequence[Shard], slots: Sequence[Slot]) -> _Done:
    """The partial directory with its files at full length, and what an interrupted run of the same merge finished."""
    stamp = hashlib.sha256(name.encode() + b"".join(shard.header for shard in shards)).hexdigest()
    journal = partial / JOURNAL
    lines = _journal_lines(journal)
    if not lines or lines[0].get("merge") != stamp:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        free = shutil.disk_usage(partial).free
        if free < sum(shard.length for shard in shards):
            shutil.rmtree(partial)
            raise OSError(28, "No space left on device", str(partial))
        for shard in shards:
            with (partial / shard.file).open("wb") as file:
                file.write(shard.header)
                file.truncate(shard.length)
        journal.write_text(json.dumps({"merge": stamp}) + "\n", encoding="utf-8")
        return _Done(journal, {})
    found = {line["tensor"]: line["sha256"] for line in lines[1:]}
    # what the journal says is checked: after a power cut a line may be on disk before its tensor
    whole = {slot.name: found[slot.name] for slot in slots if slot.name in found}
    whole = {s.name: whole[s.name] for s in slots if s.name in whole and _digest(partial, s) == whole[s.name]}
    rewritten = [{"merge": stamp}, *({"tensor": t, "sha256": d} for t, d in whole.items())]
    journal.write_text("".join(json.dumps(line) + "\n" for line in rewritten), encoding="utf-8")
    return _Done(journal, whole)


def _journal_lines(journal: Path) -> list[dict[str, Any]]:
    try:
        text = journal.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines = []
    for line in text.splitlines():
        try:
            lines.append(json.loads(line))
        except ValueError:
            break  # the line that the kill cut short
    return lines


def _digest(folder: Path, slot: Slot) -> str:
    """sha256 of a written tensor's bytes."""
    digest = hashlib.sha256()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.begin)
        left = slot.size
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()


def _compute(merged: MergedCheckpoint, partial: Path, slots: Sequence[Slot], done: _Done, threads: int) -> None:
    """Compute and write what is not done yet."""
    handles = {file: os.open(partial / file, os.O_RDWR) for file in dict.fromkeys(slot.file for slot in slots)}
    todo = [slot for slot in slots if slot.name not in done.digests]
    try:
        with progress("merging", total=sum(slot.size for slot in todo), unit="B") as bar:

            def one(slot: Slot, inner: int) -> None:
                _write_tensor(merged, slot, handles[slot.file], bar, inner)
                done.add(slot.name, _digest(partial, slot))

            if merged.plan.compat:
                for slot in todo:
                    one(slot, threads)
                return
            small = [slot for slot in todo if _blocks(merged, slot.name) < SMALL_BLOCKS]
            chosen = {slot.name for slot in small}
            ordered_map(lambda slot: one(slot, 1), small, threads)
            for slot in todo:
                if slot.name not in chosen:
                    one(slot, threads)
    finally:
        done.close()
        for handle in handles.values():
            os.close(handle)


def _blocks(merged: MergedCheckpoint, name: str) -> int:
    from gnomon.merge.blocks import BLOCK_ELEMENTS

    return -(-torch.Size(merged.info(name).shape).numel() // BLOCK_ELEMENTS)


def _write_tensor(merged: MergedCheckpoint, slot: Slot, handle: int, bar: Bar, threads: int) -> None:
    def put(start: int, rows: Tensor) -> None:
        values = rows.detach().contiguous().reshape(-1)
        view = memoryview(values.view(torch.uint8).numpy().data)
        place = slot.begin + start * values.element_size()
        bar.advance(len(view))
        while len(view):
            count = os.pwrite(handle, view, place)
            view, place = view[count:], place + count

    merged.compute(slot.name, put, threads)


def _finish(
    merged: MergedCheckpoint,
    partial: Path,
    shards: Iterable[Shard],
    slots: Sequence[Slot],
    done: _Done,
    name: str,
    copy_tokenizer: bool,
) -> dict[str, str]:
    """Index, config, tokenizer and the record; everything synced. Returns the sha256 of every file."""
    files = [shard.file for shard in shards]
    if len(files) > 1:
        table = {slot.name: slot.file for slot in slots}
        index = {"metadata": {"total_size": sum(slot.size for slot in slots)}, "weight_map": table}
        _put_json(partial / "model.safetensors.index.json", index)
    _put_json(partial / "config.json", merged.config)
    if merged.generation_config:
        _put_json(partial / "generation_config.json", merged.generation_config)
    if copy_tokenizer:
        _put_tokenizer(merged, partial)
    (partial / JOURNAL).unlink()
    sums = {file.name: _file_digest(file) for file in sorted(partial.iterdir()) if file.name != RECORD}
    infos = [merged.info(slot.name) for slot in slots]
    weights = identity.of_tensors((info.name, info.dtype, info.shape, done.digests[info.name]) for info in infos)
    record = {
        "identity": name,
        "weights_identity": weights,
        "inputs": {reference: model.identity for reference, model in merged.models.items()},
        "seed": merged.plan.seed,
        "compat": merged.plan.compat,
        "warnings": list(merged.plan.warnings),
        "tensors": len(slots),
        "bytes": sum(slot.size for slot in slots),
        "files": sums,
    }
    _put_json(partial / RECORD, record)
    for file in partial.iterdir():
        _sync(file)
    _sync(partial)
    return sums


def _put_tokenizer(merged: MergedCheckpoint, folder: Path) -> None:
    """The donor's tokenizer files as they are, or the joined tokenizer; then the chat template."""
    joined = merged.vocabulary is not None and merged.vocabulary.changed
    donor = merged.vocabulary.source if merged.vocabulary is not None else merged.donor
    home = donor.path
    if home is not None and home.is_dir():
        for file in TOKENIZER_FILES:
            if (home / file).exists() and not (joined and file not in JOINED_FILES):
                shutil.copyfile(home / file, folder / file)
    elif merged.vocabulary is None:
        from gnomon.errors import CheckpointError

        try:
            backend = merged.donor.tokenizer().backend
        except CheckpointError:
            return  # a model directory without a tokenizer merges too
        (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
        _put_json(folder / "tokenizer_config.json", _special_tokens(merged))
    if merged.vocabulary is not None:
        merged.vocabulary.write(folder)
    if merged.chat_template is not None and merged.chat_template != _copied_template(folder):
        (folder / "chat_template.jinja").write_text(merged.chat_template, encoding="utf-8")


def _copied_template(folder: Path) -> str | None:
    from gnomon.models.safetensors_checkpoint import read_chat_template

    return read_chat_template(folder)


def _special_tokens(merged: MergedCheckpoint) -> dict[str, Any]:
    tokenizer = merged.donor.tokenizer()
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = tokenizer.backend.id_to_token(tokenizer.bos_token_id)
        config["add_bos_token"] = tokenizer.add_bos
    if tokenizer.eos_token_ids:
        config["eos_token"] = tokenizer.backend.id_to_token(min(tokenizer.eos_token_ids))
    return config


def _put_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def _file_digest(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rename(partial: Path, out: Path) -> None:
    """The finished directory under its final name; what stood there goes only after that."""
    if not out.exists():
        partial.rename(out)
        return
    old = out.parent / f"{out.name}.old"
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    partial.rename(out)
    shutil.rmtree(old)
