"""Progress bars for long work: on standard error only, and silent when it is no terminal or quiet was asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_quiet = False


class Bar(Protocol):
    def advance(self, amount: float = 1) -> None: ...
    def set_total(self, total: float) -> None: ...


class _Silent:
    def advance(self, amount: float = 1) -> None:
        """Nobody looks."""

    def set_total(self, total: float) -> None:
        """Nobody looks."""


def set_quiet(quiet: bool) -> None:
    """Switch all bars off (or on again) for this process."""
    global _quiet
    _quiet = quiet


def is_quiet() -> bool:
    return _quiet


@contextmanager
def progress(title: str, total: float | None = None, unit: str = "") -> Iterator[Bar]:
    """A bar for the block. unit "B" shows bytes and speed; anything else counts."""
    if _quiet or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    counted = [DownloadColumn(), TransferSpeedColumn()] if unit == "B" else [MofNCompleteColumn()]
    columns = (TextColumn("{task.description}"), BarColumn(), *counted, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as view:
        task = view.add_task(title, total=total)

        class _Shown:
            def advance(self, amount: float = 1) -> None:
                view.advance(task, amount)

            def set_total(self, total: float) -> None:
                view.update(task, total=total)

        yield _Shown()
