"""The ledger: what was generated, with everything needed to generate it again and compare it bit for bit.

One SQLite file in the cache, readable by its owner only, written by a thread of its own. GNOMON_LEDGER=0 keeps none;
GNOMON_LEDGER_MB caps its size (256), the oldest entries go first.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import queue
import sqlite3
import threading
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.errors import GnomonError, PatchError, PatchNotFound, UsageError
from gnomon.generation import Generation, Run
from gnomon.models.cache import cache_dir

if TYPE_CHECKING:
    from gnomon.model import Model

log = logging.getLogger("gnomon.ledger")
DEFAULT_MEGABYTES = 256
CHECK_EVERY = 200
"""Entries between two looks at the file's size."""
COLUMNS = (
    "id", "choice", "created", "model", "reference", "fingerprint", "profile", "prompt_ids", "options", "replayable",
    "seed", "token_ids", "text", "finish_reason", "digest",
)  # fmt: skip
SCHEMA = f"""
CREATE TABLE IF NOT EXISTS runs ({", ".join(COLUMNS)}, PRIMARY KEY (id, choice));
CREATE INDEX IF NOT EXISTS runs_created ON runs (created);
"""


def enabled() -> bool:
    return os.environ.get("GNOMON_LEDGER", "1").lower() not in ("0", "false", "no", "off")


class Ledger:
    """Entries are queued and written in the background; reading sees what was flushed."""

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._queue: queue.Queue[Run | None] = queue.Queue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @property
    def path(self) -> Path:
        return self._path or cache_dir() / "ledger.sqlite"

    def add(self, run: Run) -> None:
        """Note a run; returns at once."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._write, name="gnomon-ledger", daemon=True)
                self._thread.start()
                atexit.register(self.close)
        self._queue.put(run)

    def flush(self) -> None:
        """Wait until all that was added is written."""
        self._queue.join()

    def close(self) -> None:
        """Write what is queued and stop. Idempotent."""
        with self._lock:
            thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(timeout=10)

    def runs(self, *, since: float = 0.0, limit: int = -1, newest_first: bool = True) -> list[Run]:
        order = "DESC" if newest_first else "ASC"
        sql = f"SELECT * FROM runs WHERE created >= ? ORDER BY created {order}, choice LIMIT ?"
        return self._select(sql, (since, limit))

    def find(self, id: str) -> list[Run]:
        """The choices of one generation, by its id or an unambiguous beginning. Raises UsageError."""
        found = self._select("SELECT * FROM runs WHERE substr(id, 1, ?) = ? ORDER BY choice", (len(id), id))
        names = {run.id for run in found}
        if len(names) > 1:
            raise UsageError(f"`{id}` could be {len(names)} runs.", hint="Give more of the id.", param="id")
        if not found:
            raise UsageError(f"No run `{id}` in the ledger.", hint="List them: gnomon runs ls", param="id")
        return found

    def remove(self, *, id: str | None = None, before: float | None = None) -> int:
        """Delete one generation, or all older than a time -> how many entries."""
        if not self.path.exists():
            return 0
        with self._connect() as db:
            if id is not None:
                return db.execute("DELETE FROM runs WHERE id = ?", (id,)).rowcount
            return db.execute("DELETE FROM runs WHERE created < ?", (before,)).rowcount

    def _select(self, sql: str, values: tuple[Any, ...]) -> list[Run]:
        self.flush()
        if not self.path.exists():
            return []
        with self._connect() as db:
            return [_run(row) for row in db.execute(sql, values)]

    @contextmanager
    def _connect(self) -> Iterator[sqlite3.Connection]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            if not self.path.exists():
                os.close(os.open(self.path, os.O_CREAT | os.O_RDWR, 0o600))
            db = sqlite3.connect(self.path, timeout=10)
            db.row_factory = sqlite3.Row
            try:
                db.execute("PRAGMA journal_mode=WAL")
                db.executescript(SCHEMA)
                with db:
                    yield db
            finally:
                db.close()
        except (sqlite3.Error, OSError) as error:
            raise GnomonError(f"The ledger {self.path} cannot be used: {error}.") from error

    def _write(self) -> None:
        written = 0
        while True:
            batch = [self._queue.get()]
            with contextlib.suppress(queue.Empty):
                while True:
                    batch.append(self._queue.get_nowait())
            runs = [run for run in batch if run is not None]
            try:
                if runs:
                    self._insert(runs)
                    written += len(runs)
                    if written % CHECK_EVERY < len(runs):
                        self._keep_small()
            except GnomonError as error:
                log.warning("%s", error)
            finally:
                for _ in batch:
                    self._queue.task_done()
            if None in batch:
                return

    def _insert(self, runs: list[Run]) -> None:
        marks = ", ".join("?" * len(COLUMNS))
        with self._connect() as db:
            db.executemany(f"INSERT OR REPLACE INTO runs VALUES ({marks})", [_row(run) for run in runs])

    def _keep_small(self) -> None:
        """Drop the oldest tenth until the file's content fits."""
        most = float(os.environ.get("GNOMON_LEDGER_MB", DEFAULT_MEGABYTES)) * 1e6
        with self._connect() as db:
            while True:
                pages, free, size = (
                    db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count", "page_size")
                )
                count = db.execute("SELECT count(*) FROM runs").fetchone()[0]
                if (pages - free) * size <= most or count == 0:
                    return
                sql = "DELETE FROM runs WHERE rowid IN (SELECT rowid FROM runs ORDER BY created LIMIT ?)"
                db.execute(sql, (max(1, count // 10),))


@dataclass(frozen=True)
class Replay:
    """One run made again. verdict: "identical" | "different" | "other numbers" | "not replayable"."""

    run: Run
    verdict: str
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.verdict == "identical"


def replay(runs: list[Run], model: Model) -> list[Replay]:
    """Generate the choices of one generation again and compare tokens, end and the checksums of all logits."""
    return [verdict for verdict, _ in regenerate(runs, model)]


def regenerate(runs: list[Run], model: Model, *, report: bool = False) -> list[tuple[Replay, Generation | None]]:
    """`replay`, with the text that came. report: with all that the model can tell of each token."""
    first, model = runs[0], model.unpatched  # the patches of a run stand in its options
    if not first.replayable:
        return _none(runs, "not replayable", "its options or its prompt were not kept")
    options = {"patches": [], **first.options, "seed": first.seed}
    try:
        fingerprint = model.fingerprint_of(options)
    except (PatchError, PatchNotFound) as error:
        return _none(runs, "not replayable", str(error))
    if first.fingerprint != fingerprint:
        return _none(runs, "other numbers", f"made with {first.fingerprint}, this model has {fingerprint}")
    seen: dict[int, Run] = {}
    for key, value in model.reporting.items() if report else ():
        options[key] = {**options.get(key, {}), **value} if isinstance(value, dict) else value
    handle = model.submit(first.prompt_ids, options, observer=lambda run: seen.update({run.choice: run}))
    made = {generation.index: generation for generation in handle.collect()}
    return [(_compare(run, seen.get(run.choice)), made.get(run.choice)) for run in runs]


def _none(runs: list[Run], verdict: str, detail: str) -> list[tuple[Replay, Generation | None]]:
    return [(Replay(run, verdict, detail), None) for run in runs]


def _compare(run: Run, again: Run | None) -> Replay:
    if again is None:
        return Replay(run, "different", "this choice did not come again")
    if again.token_ids != run.token_ids:
        pairs = enumerate(zip(run.token_ids, again.token_ids, strict=False))
        place = next((i for i, (a, b) in pairs if a != b), min(len(run.token_ids), len(again.token_ids)))
        return Replay(run, "different", f"the first other token is number {place}")
    if again.digest != run.digest:
        return Replay(run, "different", "the same tokens from other logits")
    if again.finish_reason != run.finish_reason:
        return Replay(run, "different", f"it ended with {again.finish_reason}, not {run.finish_reason}")
    return Replay(run, "identical")


def _row(run: Run) -> tuple[Any, ...]:
    values: dict[str, Any] = {name: getattr(run, name) for name in COLUMNS}
    values |= {name: array("i", values[name]).tobytes() for name in ("prompt_ids", "token_ids")}
    values |= {"options": json.dumps(run.options), "seed": str(run.seed)}
    return tuple(values.values())


def _run(row: sqlite3.Row) -> Run:
    values = dict(row)
    values |= {name: list(array("i", values[name])) for name in ("prompt_ids", "token_ids")}
    values |= {"options": json.loads(values["options"]), "seed": int(values["seed"])}
    values["replayable"] = bool(values["replayable"])
    return Run(**values)


def parse_age(text: str) -> float:
    """ "90s", "15m", "2h", "1d", "3w" before now -> a time. Raises UsageError."""
    units = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
    try:
        return time.time() - float(text[:-1]) * units[text[-1:]]
    except (ValueError, KeyError):
        raise UsageError(f"`{text}` is no age.", hint="Examples: 90s, 15m, 2h, 1d, 3w.") from None
