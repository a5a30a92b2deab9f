"""The built native library, one file per instruction set, and the choice among them.

The best one that this processor runs is loaded; GNOMON_ISA=v4vnni|v4|v3|generic takes another: the bits are the same.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib.resources import files
from pathlib import Path

from gnomon.errors import UsageError

ORDER = ("v4vnni", "v4", "v3", "generic")


def folder() -> Path:
    """Where the built libraries lie: beside this file, or where an editable install put them."""
    import gnomon.kernels._native as package

    for place in package.__path__:
        if any(Path(place).glob("libgnomon_*")) or (Path(place) / "unavailable.txt").exists():
            return Path(place)
    return Path(str(files(package)))


@cache
def unavailable_reason() -> str | None:
    """Why there is no native library; None when there is one."""
    place = folder()
    if any(place.glob("libgnomon_*")):
        return None
    record = place / "unavailable.txt"
    if record.exists():
        return record.read_text(encoding="utf-8").strip()
    return "this installation was made without building them: reinstall with `pip install .`"


def open_library(isa: str | None = None) -> ctypes.CDLL:
    """The library for an instruction set (default: GNOMON_ISA, else the best). Raises UsageError."""
    wanted = isa or os.environ.get("GNOMON_ISA")
    if wanted is not None and wanted not in ORDER:
        raise UsageError(f"Unknown instruction set `{wanted}`.", hint=f"Known: {', '.join(ORDER)}.")
    for name in (wanted,) if wanted else ORDER:
        for path in folder().glob(f"libgnomon_{name}.*"):
            library = ctypes.CDLL(str(path))
            if library.gnomon_supported():
                return library
    raise UsageError(f"No native kernels for `{wanted or 'this processor'}` are built here or run here.")
