"""Writing a merge to a model directory: streamed, bounded, resumable, atomic.

Tensors go to their final place in preallocated safetensors shards of `OUT.partial/`, block by block; a journal line per
finished tensor lets a later run go on after a kill; the directory gets its final name when all of it is there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gnomon.errors import GnomonError, MergeError
from gnomon.merge.budget import Budget, parse_bytes
from gnomon.merge.finishing import RECORD, finish, rename
from gnomon.merge.journal import Done, prepare, slot_digest
from gnomon.merge.merged import MergedCheckpoint
from gnomon.merge.parallel import ordered_map
from gnomon.merge.shards import SHARD_BYTES, Shard, Slot, lay_out
from gnomon.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.progress import Bar

SMALL_BLOCKS = 4
"""Tensors of fewer blocks are computed side by side; larger ones one after another, each on all threads."""


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
    shards, slots = lay_out(merged, parse_bytes(shard_bytes, "out_shard_size"), name)
    around = _around(merged, shards, copy_tokenizer)
    if (finished := _finished(out, name, around)) is not None:
        return finished
    if out.exists() and not overwrite and any(out.iterdir() if out.is_dir() else [out]):
        raise MergeError(f"{out} already exists and is not this merge.", hint="Choose another path, or --overwrite.")
    partial = out.parent / f"{out.name}.partial"
    try:
        done = prepare(partial, name, shards, slots)
        _compute(merged, partial, slots, done, budget.threads)
        files = finish(merged, partial, shards, slots, done, name, copy_tokenizer, around)
        rename(partial, out)
    except GnomonError:
        shutil.rmtree(partial, ignore_errors=True)  # the inputs are at fault: there is nothing to go on with
        raise
    except OSError as error:
        if error.errno == 28:
            raise MergeError(
                f"The disk of {out.parent.resolve()} is full; {out} was not made.",
                hint="Free some space and run the same command again: it goes on where it stopped.",
            ) from None
        raise
    total = sum(slot.size for slot in slots)
    return Written(out, name, len(slots), done.resumed, total, time.monotonic() - started, files)


def write_tensors(
    merged: MergedCheckpoint, folder: Path, shards: Sequence[Shard], slots: Sequence[Slot], *, threads: int
) -> None:
    """All tensors into a folder, from the beginning."""
    stamp = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
    shutil.rmtree(folder, ignore_errors=True)
    _compute(merged, folder, slots, prepare(folder, stamp, shards, slots), threads)


def _around(merged: MergedCheckpoint, shards: Sequence[Shard], copy_tokenizer: bool) -> str:
    """Names what a written merge holds beside its numbers: files, config, template, tokenizer."""
    facts = [merged.config, merged.generation_config, merged.chat_template, merged.donor.identity, copy_tokenizer]
    headers = hashlib.sha256(b"".join(shard.header for shard in shards)).hexdigest()
    return hashlib.sha256(json.dumps([facts, headers], sort_keys=True).encode()).hexdigest()


def _finished(out: Path, name: str, around: str) -> Written | None:
    """What an earlier, complete run of the same merge left."""
    try:
        record = json.loads((out / RECORD).read_text())
    except (OSError, ValueError):
        return None
    if record.get("identity") != name or record.get("around", around) != around:
        return None
    return Written(out, name, record["tensors"], record["tensors"], record["bytes"], 0.0, record["files"])


def _compute(merged: MergedCheckpoint, partial: Path, slots: Sequence[Slot], done: Done, threads: int) -> None:
    """Compute and write what is not done yet."""
    handles = {file: os.open(partial / file, os.O_RDWR) for file in dict.fromkeys(slot.file for slot in slots)}
    todo = [slot for slot in slots if slot.name not in done.digests]
    try:
        with progress("merging", total=sum(slot.size for slot in todo), unit="B") as bar:

            def one(slot: Slot, inner: int) -> None:
                _write_tensor(merged, slot, handles[slot.file], bar, inner)
                done.add(slot.name, slot_digest(partial, slot))

            if merged.plan.compat:
                waiting = {slot.name: slot for slot in todo}
                for name in merged.order:
                    if name in waiting:
                        one(waiting[name], threads)
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
