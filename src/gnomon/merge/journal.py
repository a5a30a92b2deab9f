"""The partial directory of a run: files at full length, and a journal of the tensors that are finished.

What the journal says is checked against the bytes before it is believed, so a run goes on after a kill or a power cut.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gnomon.merge.shards import Shard, Slot

JOURNAL = "journal.jsonl"


class Done:
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


def prepare(partial: Path, name: str, shards: Sequence[Shard], slots: Sequence[Slot]) -> Done:
    """The partial directory with its files at full length, and what an interrupted run of the same merge finished."""
    stamp = hashlib.sha256(name.encode() + b"".join(shard.header for shard in shards)).hexdigest()
    journal = partial / JOURNAL
    lines = journal_lines(journal)
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
        return Done(journal, {})
    found = {line["tensor"]: line["sha256"] for line in lines[1:]}
    # what the journal says is checked: after a power cut a line may be on disk before its tensor
    whole = {slot.name: found[slot.name] for slot in slots if slot.name in found}
    whole = {s.name: whole[s.name] for s in slots if s.name in whole and slot_digest(partial, s) == whole[s.name]}
    rewritten = [{"merge": stamp}, *({"tensor": t, "sha256": d} for t, d in whole.items())]
    journal.write_text("".join(json.dumps(line) + "\n" for line in rewritten), encoding="utf-8")
    return Done(journal, whole)


def journal_lines(journal: Path) -> list[dict[str, Any]]:
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


def slot_digest(folder: Path, slot: Slot) -> str:
    """sha256 of a written tensor's bytes."""
    digest = hashlib.sha256()
    with (folder / slot.file).open("rb") as file:
        file.seek(slot.begin)
        left = slot.size
        while left and (data := file.read(min(left, 1 << 20))):
            digest.update(data)
            left -= len(data)
    return digest.hexdigest()
