"""Threads for scanners: some of their own for each, so that one that hangs holds up only itself.

There are as many as calls are out, up to MOST; FEW stay. They are daemons: a scanner that never returns does not keep
the process. Knows nothing of texts.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import cache
from typing import Any

FEW = 4
MOST = 32


class Workers:
    """Calls in, futures out, in the order of submission."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.threads = 0
        self._calls: queue.SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._out = 0  # calls that wait or run

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._out += 1
            if self._out > self.threads and self.threads < MOST:
                self._begin()
        self._calls.put((future, function, arguments))
        return future

    def _begin(self) -> None:
        self.threads += 1
        threading.Thread(target=self._loop, name=f"gnomon-guard-{self.name}", daemon=True).start()

    def _loop(self) -> None:
        while True:
            future, function, arguments = self._calls.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except BaseException as error:
                    future.set_exception(error)
            del future, function, arguments  # they hold a text
            with self._lock:
                self._out -= 1
                if self.threads > max(FEW, self._out):
                    self.threads -= 1
                    return


@cache
def workers_of(name: str) -> Workers:
    """The threads of one scanner, shared by all sessions."""
    return Workers(name)
