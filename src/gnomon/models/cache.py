"""Where fetched and derived files live, and how they come to be whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def cache_dir() -> Path:
    """$GNOMON_HOME, else $XDG_CACHE_HOME/gnomon, else ~/.cache/gnomon."""
    if home := os.environ.get("GNOMON_HOME"):
        return Path(home).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gnomon"


def models_dir() -> Path:
    return cache_dir() / "models"


def offline() -> bool:
    """GNOMON_OFFLINE=1 forbids every fetch."""
    return os.environ.get("GNOMON_OFFLINE", "").lower() in ("1", "true", "yes", "on")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its final name complete and synced, or not at all."""
    fresh = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{secrets.token_hex(8)}"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)  # as readable as any file of this user
    try:
        with os.fdopen(handle, "wb") as out:
            yield out
            out.flush()
            os.fsync(out.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if fresh and not any(path.parent.iterdir()):
            path.parent.rmdir()
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(errno.ENOSPC, "The disk is full; this was not written", str(path)) from None
        raise
