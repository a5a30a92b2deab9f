"""A scanner on one text: where it looks, and what its judgements mean.

It looks at canonical points, never at pieces as they arrive: ends of sentences, and every `stride` characters where
none comes; at each it sees the last `context` characters. So its verdict depends on the text alone, whenever it comes.
Knows nothing of threads or of other scanners.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from gnomon.guard.lane import Hit
from gnomon.guard.scanning import Judgement, Scanner

ENDS = ".!?\n。！？"
SENTENCE = re.compile(rf"[{ENDS}]\s")


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

    @property
    def holds(self) -> bool:
        """Whether text waits for its verdict."""
        return self.gate and self.action != "flag"


class Failure(NamedTuple):
    """A look that gave no judgement. why: without anything of the text."""

    why: str


class Place(NamedTuple):
    """A look to take: at `text`, which ends at `point`; what it judges begins at `start`."""

    start: int
    point: int
    text: str


class Watcher:
    """The running state of one scanner on one text."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self._opening = threading.Lock()
        self.judge_text: Callable[[str, str], Judgement] | None = None  # made with the first look
        self.position = 0
        self.text = ""  # the last `context` characters
        self.point = 0  # where it looked last
        self.cleared = 0  # text before it is judged
        self.streak = 0
        self.streak_start = 0
        self.may_end = False  # the last character ends a sentence if a space follows
        self.hits: list[Hit] = []

    # -- where it looks -------------------------------------------------------------------------------------------

    def next_point(self, text: str) -> int:
        """How many characters of what comes next it needs for its next look; all of them when there is none."""
        if self.may_end and text[0].isspace() and self.position > self.point:
            return 1
        left = self.watch.stride - (self.position - self.point)
        found = SENTENCE.search(text, 0, left)
        return found.end() if found else min(left, len(text))

    def advance(self, piece: str) -> Place | None:
        """More text, not past its next point -> the look to take there."""
        spaced = piece[-1].isspace() and (piece[-2] in ENDS if len(piece) > 1 else self.may_end)
        place = None
        if spaced and self.position + len(piece) - 1 > self.point:
            self._add(piece[:-1])
            place = self._place()
            self._add(piece[-1])
        else:
            self._add(piece)
        self.may_end = piece[-1] in ENDS
        if place is None and self.position - self.point >= self.watch.stride:
            place = self._place()
        return place

    def finish(self) -> Place | None:
        """The look at what is left at the end."""
        return self._place() if self.position > self.point else None

    def look(self, text: str, prompt: str) -> Judgement:
        """The scanner's judgement; of one that remembers, always by the same judge."""
        if self.watch.scanner.opens is None:
            return self.watch.scanner(text, prompt)
        with self._opening:
            if self.judge_text is None:
                self.judge_text = self.watch.scanner.opened()
        return self.judge_text(text, prompt)

    def _add(self, text: str) -> None:
        whole = self.watch.scanner.opens is not None
        self.text = self.text + text if whole else (self.text + text)[-self.watch.context :]
        self.position += len(text)

    def _place(self) -> Place:
        start, self.point = self.point, self.position
        return Place(start, self.point, self.text)

    # -- what it found --------------------------------------------------------------------------------------------

    def judge(self, start: int, point: int, found: Judgement | Failure) -> Hit | None:
        """The outcome of its looks, one after the other -> where the text must end, if it must."""
        watch, self.cleared = self.watch, point
        if isinstance(found, Failure):
            hit = Hit(start, point, watch.error_number, note=found.why)
            return self._told(hit, watch.fail_open or watch.action == "flag")
        if found.score < watch.threshold:
            self.streak = 0
            return None
        self.streak_start = self.streak_start if self.streak else start
        self.streak += 1
        if self.streak < watch.debounce:
            return None
        self.streak = 0
        hit = Hit(self.streak_start, point, watch.number, score=found.score, note=found.note)
        return self._told(hit, watch.action == "flag")

    def judge_end(self) -> Hit | None:
        """Nothing comes that could disagree with the last looks."""
        if not self.streak:
            return None
        self.streak = 0
        return self._told(Hit(self.streak_start, self.position, self.watch.number), self.watch.action == "flag")

    def _told(self, hit: Hit, only_told: bool) -> Hit | None:
        if only_told:
            self.hits.append(hit)
            return None
        self.cleared = min(self.cleared, hit.start)
        return hit

    @property
    def settled(self) -> int:
        """Text before it is judged for good."""
        return self.streak_start if self.streak else self.cleared

    @property
    def frontier(self) -> int:
        """Text before it may leave, as far as this scanner goes."""
        if self.watch.action == "flag":
            return self.position
        return self.settled if self.watch.gate else min(self.position, self.settled + self.watch.max_exposure)

    # -- keeping --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "text": self.text,
            "point": self.point,
            "cleared": self.cleared,
            "streak": self.streak,
            "streak_start": self.streak_start,
            "may_end": self.may_end,
            "hits": [list(hit) for hit in self.hits],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        for name in ("position", "text", "point", "cleared", "streak", "streak_start", "may_end"):
            setattr(self, name, saved[name])
        self.hits = [Hit(*one) for one in saved["hits"]]
