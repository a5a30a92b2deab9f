"""A file of several documents, each written: mergekit-multi's way. Later documents read what earlier ones wrote."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from gnomon.merge.build import MergeRun, documents_in_order, open_document
from gnomon.merge.shards import SHARD_BYTES
from gnomon.merge.writer import Written, write
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.reference import open_path


def write_all(
    file: Path,
    out: Path,
    intermediates: Path,
    run: MergeRun,
    *,
    max_memory: int | str | None = None,
    shard_bytes: int | str = SHARD_BYTES,
    overwrite: bool = False,
) -> Iterator[tuple[str, Written]]:
    """Every named document under intermediates/NAME, the result under `out`; what is finished already is kept."""
    known: dict[str, Checkpoint] = {}
    *named, final = documents_in_order(file)
    for options in named:
        name = str(options.name)
        place = intermediates / name
        merged = open_document(options, file, run, known)
        yield name, write(merged, place, max_memory=max_memory, shard_bytes=shard_bytes, overwrite=overwrite)
        known[name] = open_path(place)
    merged = open_document(final, file, run, known)
    yield (
        final.name or "result",
        write(merged, out, max_memory=max_memory, shard_bytes=shard_bytes, overwrite=overwrite),
    )
