"""The worker: an engine on a thread of its own, fed from any thread.

Idle it sleeps. Callbacks of requests run on its thread; submitting and cancelling are thread-safe and immediate.
"""

from __future__ import annotations

import atexit
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from torch import Tensor

from gnomon.engine.drafting import Drafter, PromptLookup
from gnomon.engine.engine import Engine, EngineStats
from gnomon.engine.memory import Housekeeper
from gnomon.engine.reader import Reader
from gnomon.engine.request import Request
from gnomon.engine.runner import Runner
from gnomon.errors import NotReady, UsageError
from gnomon.kernels.side import SidePath

Result = TypeVar("Result")
SECONDS_PAUSED = 0.005
"""Between two questions to requests that are not ready, when there is nothing else to do."""
__all__ = ["EngineStats", "EngineWorker"]


OPEN: weakref.WeakSet[EngineWorker] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """An interpreter that ends under a running engine thread would tear it down in the middle of native code."""
    for worker in list(OPEN):
        worker.close(timeout=5)


class EngineWorker:
    """Owns one Engine."""

    def __init__(
        self,
        runner: Runner,
        *,
        fingerprint: str = "",
        max_sequences: int = 64,
        token_budget: int = 256,
        drafter: Callable[[], Drafter] | None = PromptLookup,
        sentinel_every: int = 0,
    ) -> None:
        self._engine = Engine(
            runner,
            fingerprint=fingerprint,
            max_sequences=max_sequences,
            token_budget=token_budget,
            drafter=drafter,
            sentinel_every=sentinel_every,
        )
        self.max_context = runner.max_context
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._paused_by: int | None = None
        self._thread = threading.Thread(target=self._loop, name="gnomon-engine", daemon=True)
        self._thread.start()
        OPEN.add(self)

    def submit(self, request: Request) -> None:
        """Queue a request. Raises at once what could never run; NotReady after close()."""
        self._engine.check(request)

        def enter() -> None:
            self._engine.submit(request)

        self._post(enter)

    def cancel(self, request_id: str) -> None:
        """End a request before the next step. Harmless when it has ended."""
        with self._wake:
            if not self._closing:
                self._inbox.append(lambda: self._engine.cancel(request_id))
                self._wake.notify()

    def run_exclusive(self, function: Callable[[], Result]) -> Result:
        """Run a function on the engine's thread between two steps, and give back what it returns or raises."""
        future: Future[Result] = Future()

        def enter() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._post(enter)
        return future.result()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No step runs inside the block."""
        entered, leave = threading.Event(), threading.Event()

        def hold() -> None:
            entered.set()
            leave.wait()

        self._post(hold)
        entered.wait()
        self._paused_by = threading.get_ident()
        try:
            yield
        finally:
            self._paused_by = None
            leave.set()

    def logits(self, token_ids: list[int], sides: tuple[SidePath, ...] = ()) -> Tensor:
        """Logits after every token of a text -> [T, V]. sides: patches that run beside the weights."""
        return self.run_exclusive(lambda: self._engine.logits(token_ids, sides))

    def hidden(self, token_ids: list[int], sides: tuple[SidePath, ...] = ()) -> Tensor:
        """Final hidden states of a text -> [T, C]."""
        return self.run_exclusive(lambda: self._engine.hidden(token_ids, sides))

    def reader(self) -> Reader:
        """Eyes for a text that grows; its methods belong on the engine's thread: `run_exclusive(reader.close)`."""
        return self.run_exclusive(self._engine.reader)

    def weights_changed(self, fingerprint: str) -> None:
        """Flush what was computed with the old weights, before another step runs."""
        if self._paused_by == threading.get_ident():
            self._engine.weights_changed(fingerprint)  # the engine's thread is held: nothing else touches it
        else:
            self._post(lambda: self._engine.weights_changed(fingerprint))

    def stats(self) -> EngineStats:
        """A snapshot; counters only, so it needs no pause. What waits in the inbox counts as waiting."""
        stats = self._engine.stats()
        return replace(stats, waiting=stats.waiting + len(self._inbox))

    def close(self, timeout: float | None = None) -> None:
        """Cancel everything and join the thread (for at most `timeout` seconds). Idempotent."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def _post(self, action: Callable[[], None]) -> None:
        if self._paused_by == threading.get_ident():
            raise UsageError(
                "The engine is paused by this very thread (model.module()): it would wait for itself.",
                hint="Leave the block first, or use the module itself.",
            )
        with self._wake:
            if self._closing:
                raise NotReady("The engine was closed.")
            self._inbox.append(action)
            self._wake.notify()

    def _loop(self) -> None:
        busy, housekeeper = False, Housekeeper()
        while True:
            with self._wake:
                if not (busy or self._inbox or self._closing) and self._engine.paused:
                    self._wake.wait(SECONDS_PAUSED)
                    busy = True  # who was not ready may be now
                while not (busy or self._inbox or self._closing):
                    self._wake.wait()
                if self._closing:
                    break
                actions = deque(self._inbox)
                self._inbox.clear()
            while actions:  # none is kept while the engine sleeps: they hold what others wait to let go of
                actions.popleft()()
            busy = self._engine.step()
            housekeeper.after(busy)
        self._end_all()

    def _end_all(self) -> None:
        """Every request gets its end, queued ones included."""
        for action in list(self._inbox):
            action()
        self._engine.cancel_all()
