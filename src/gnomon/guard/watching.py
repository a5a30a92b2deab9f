"""A scanner as a gate of a session: it looks at canonical points of the text, never at pieces as they arrive.

Points are ends of sentences, and every `stride` characters where none comes; at each the scanner sees the last
`context` characters. So its verdict depends on the text alone. It runs in a pool with a deadline; when it fails or is
late, the session is blocked (fail closed) or the failure is reported (fail open). Knows nothing of what it computes.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from dataclasses import dataclass
from functools import cache
from typing import Any

from gnomon.guard.lane import Hit
from gnomon.guard.scanning import Judgement, Scanner

WORKERS = 8
ENDS = ".!?\n。！？"


@cache
def pool() -> ThreadPoolExecutor:
    """One pool for all sessions: a scanner that hangs takes one worker of it, not the server."""
    return ThreadPoolExecutor(WORKERS, thread_name_prefix="gnomon-guard")


@dataclass(frozen=True)
class Watch:
    """A check by a scanner. number, error_number: its places in the guard's list of rules."""

    scanner: Scanner
    number: int
    error_number: int
    action: str
    threshold: float
    gate: bool = True
    stride: int = 240
    context: int = 1000
    debounce: int = 1
    max_exposure: int = 480
    fail_open: bool = False
    seconds: float = 1.5


class Watcher:
    """The running state of one scanner on one text."""

    urgent = True

    def __init__(self, watch: Watch, prompt: str = "") -> None:
        self.watch = watch
        self.prompt = prompt
        self.position = 0
        self.text = ""  # the last `context` characters
        self.point = 0  # where it looked last
        self.streak = 0
        self.streak_start = 0
        self.may_end = False  # the last character ends a sentence if a space follows
        self.hits: list[Hit] = []
        self._stopped: Hit | None = None

    def feed(self, text: str) -> None:
        for character in text:
            if self._stopped is not None:
                return
            if self.may_end and character.isspace():
                self._look()
            self.text = (self.text + character)[-self.watch.context :]
            self.position += 1
            self.may_end = character in ENDS
            if self.position - self.point >= self.watch.stride:
                self._look()

    def finish(self) -> None:
        if self._stopped is None and self.position > self.point:
            self._look()
        if self._stopped is None and self.streak:
            self._found(self.streak_start, Judgement(1.0))  # nothing comes that could disagree

    def _look(self) -> None:
        watch, start, self.point = self.watch, self.point, self.position
        future: Future[Judgement] = pool().submit(watch.scanner, self.text, self.prompt)
        try:
            found = future.result(timeout=watch.seconds)
            score = float(found.score)
            if not 0 <= score <= 1:
                raise ValueError("a score outside 0..1")
        except Late:
            future.cancel()
            self._failed(start, f"{watch.scanner.name} took longer than {watch.seconds:g} s")
            return
        except Exception as error:  # whatever a scanner does wrong, the text must not leave unseen
            self._failed(start, f"{watch.scanner.name} failed: {type(error).__name__}")
            return
        if score < watch.threshold:
            self.streak = 0
            return
        self.streak_start = self.streak_start if self.streak else start
        self.streak += 1
        if self.streak >= watch.debounce:
            self.streak = 0
            self._found(self.streak_start, found)

    def _found(self, start: int, found: Judgement) -> None:
        hit = Hit(start, self.position, self.watch.number, score=found.score, note=found.note)
        if self.watch.action == "block":
            self._stopped = hit
        else:
            self.hits.append(hit)

    def _failed(self, start: int, why: str) -> None:
        hit = Hit(start, self.position, self.watch.error_number, score=1.0, note=why)
        if self.watch.fail_open or self.watch.action == "flag":
            self.hits.append(hit)
        else:
            self._stopped = hit

    @property
    def frontier(self) -> int:
        if self.watch.action == "flag":
            return self.position
        cleared = self.streak_start if self.streak else self.point
        if self._stopped is not None:
            cleared = min(cleared, self._stopped.start)
        return cleared if self.watch.gate else min(self.position, cleared + self.watch.max_exposure)

    @property
    def settled(self) -> int:
        return self.streak_start if self.streak else self.point

    @property
    def stopped(self) -> Hit | None:
        return self._stopped

    @property
    def runs(self) -> list[Hit]:
        return []

    def take(self) -> list[Hit]:
        found, self.hits = self.hits, []
        return found

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "text": self.text,
            "point": self.point,
            "streak": self.streak,
            "streak_start": self.streak_start,
            "may_end": self.may_end,
            "prompt": self.prompt,
            "hits": [[h.start, h.end, h.number, h.overflow, h.score, h.note] for h in self.hits],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.position, self.text, self.point = saved["position"], saved["text"], saved["point"]
        self.streak, self.streak_start = saved["streak"], saved["streak_start"]
        self.may_end, self.prompt = saved["may_end"], saved["prompt"]
        self.hits = [Hit(*one) for one in saved["hits"]]
