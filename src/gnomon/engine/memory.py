"""Freed memory goes back to the system when the engine falls idle.

A step's largest buffers (64 rows of a vocabulary's logits are 12 MB) are of another size each time, and glibc keeps
what it once had: measured, a server's heap held 250 MB of free memory after a burst. Elsewhere this does nothing.
"""

from __future__ import annotations

import ctypes
import sys
import time
from functools import cache
from typing import Any

SECONDS_BETWEEN = 10.0
"""At most so often: what is given back must be asked for again."""


@cache
def _malloc_trim() -> Any:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not


def give_back() -> None:
    """Return the heap's free memory to the system; some milliseconds."""
    if (trim := _malloc_trim()) is not None:
        trim(0)


class Housekeeper:
    """Told after every step whether there was work; gives memory back when work ends, not too often."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self._worked = False

    def after(self, worked: bool) -> None:
        idle_now, self._worked = self._worked and not worked, worked
        if idle_now and time.monotonic() - self._last > SECONDS_BETWEEN:
            self._last = time.monotonic()
            give_back()
