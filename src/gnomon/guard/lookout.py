"""The scanners of one text, at work beside it: looks go out as the text passes their points and come back when done.

Verdicts count in the order of the text, never in that of their arrival: a scanner's looks are judged one after the
other, those that hold text all in one order, and the text ends only when no earlier look can end it earlier. With every
look the rules' own frontier at that place is kept, so that what has left when the text ends does not depend on how
far the text had gone on meanwhile. Knows nothing of what scanners compute.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, NamedTuple

from gnomon.guard.lane import Hit
from gnomon.guard.scanning import Judgement
from gnomon.guard.watching import Failure, Place, Watch, Watcher
from gnomon.guard.workers import workers_of

MOST_PENDING = 64
"""Looks of one text that may be out: a text that runs further ahead is to wait until half of them are back."""


class Stop(NamedTuple):
    """Where the text ends. limit: most that leaves; settled: what the rules had decided by then; number: the look's."""

    hit: Hit
    limit: int
    settled: int
    number: int


@dataclass(eq=False)
class Look:
    """One look on its way; it comes back with the time when it was done. deadline: on the same monotonic clock."""

    number: int
    watcher: Watcher
    place: Place
    future: Future[tuple[Judgement, float]]
    deadline: float
    limit: int
    settled: int

    def outcome(self) -> Judgement | Failure | None:
        """None: not there yet."""
        name, future = self.watcher.watch.scanner.name, self.future
        if not future.done():
            if time.monotonic() < self.deadline:
                return None
            future.cancel()
            return Failure(f"{name} took longer than {self.watcher.watch.seconds:g} s")
        error = future.exception()
        if error is not None:  # whatever a scanner does wrong, the text must not leave unseen
            return Failure(f"{name} failed: {type(error).__name__}")
        found, when = future.result()
        if when > self.deadline:  # late is late, whenever somebody looks
            return Failure(f"{name} took longer than {self.watcher.watch.seconds:g} s")
        try:
            if 0 <= float(found.score) <= 1:
                return found
        except (TypeError, ValueError, AttributeError):
            return Failure(f"{name} failed: it gave no judgement")
        return Failure(f"{name} failed: a score outside 0..1")


def _timed(watcher: Watcher, text: str, prompt: str) -> tuple[Judgement, float]:
    found = watcher.look(text, prompt)
    return found, time.monotonic()


class Lookout:
    """The running state of all scanners on one text. prompt: what the text answers."""

    def __init__(self, watches: Sequence[Watch], prompt: str = "") -> None:
        self.watchers = [Watcher(watch) for watch in watches]
        self.prompt = prompt
        self.pending: list[Look] = []
        self._found: list[tuple[int, Hit]] = []  # reports, with the number of their look
        self._count = 0
        self._candidate: Stop | None = None
        self._behind = False

    # -- text in --------------------------------------------------------------------------------------------------

    def next_point(self, text: str) -> int:
        """How many characters of what comes next lead to the next look of any scanner."""
        return min(watcher.next_point(text) for watcher in self.watchers)

    def feed(self, piece: str, limit: int, settled: int) -> None:
        """More text, not past the next point. limit, settled: how far the rules are, this piece included."""
        for watcher in self.watchers:
            if (place := watcher.advance(piece)) is not None:
                self._send(watcher, place, limit, settled)

    def finish(self, limit: int, settled: int) -> None:
        """The text is complete: the last looks, and what is left of waiting for second ones."""
        for watcher in self.watchers:
            if (place := watcher.finish()) is not None:
                self._send(watcher, place, limit, settled)
        self.poll(most=0)
        for watcher in self.watchers:
            if self._candidate is None and (hit := watcher.judge_end()) is not None:
                self._candidate = Stop(hit, min(hit.start, limit), settled, self._count)
            self._collect(watcher, self._count)

    def _send(self, watcher: Watcher, place: Place, limit: int, settled: int) -> None:
        if self._candidate is not None:
            return  # it would come after the end
        watch = watcher.watch
        future = workers_of(watch.scanner.name).submit(_timed, watcher, place.text, self.prompt)
        deadline = time.monotonic() + watch.seconds
        self.pending.append(Look(self._count, watcher, place, future, deadline, limit, settled))
        self._count += 1

    # -- verdicts in ----------------------------------------------------------------------------------------------

    def poll(self, most: int | None = None) -> None:
        """Judge what has come back. most: wait until at most so many looks are out; None: wait for nothing."""
        self._judge()
        while most is not None and len(self.pending) > most:
            waiting = [look.future for look in self.pending if not look.future.done()]
            if waiting:
                first = min(look.deadline for look in self.pending)
                wait(waiting, timeout=max(0.0, first - time.monotonic()), return_when="FIRST_COMPLETED")
            self._judge()

    def _judge(self) -> None:
        """Every look whose turn it is and whose outcome is there."""
        behind: set[Watcher] = set()
        holding = False  # an earlier look that holds text is still out
        for look in list(self.pending):
            watcher, holds = look.watcher, look.watcher.watch.holds
            outcome = None if watcher in behind or (holds and holding) else look.outcome()
            if outcome is None:
                behind.add(watcher)
                holding |= holds
                continue
            self.pending.remove(look)
            hit = watcher.judge(look.place.start, look.place.point, outcome)
            self._collect(watcher, look.number)
            if hit is not None and (self._candidate is None or look.number < self._candidate.number):
                others = [w.frontier for w in self.watchers if w.watch.holds]
                self._candidate = Stop(hit, min([hit.start, look.limit, *others]), look.settled, look.number)
                self._drop_after(look.number)
                break
        else:
            return
        self._judge()

    def _collect(self, watcher: Watcher, number: int) -> None:
        self._found += [(number, hit) for hit in watcher.hits]
        watcher.hits = []

    def _drop_after(self, number: int) -> None:
        """What lies past the end was never text."""
        for look in self.pending:
            if look.number > number:
                look.future.cancel()
        self.pending = [look for look in self.pending if look.number < number]
        self._found = [(n, hit) for n, hit in self._found if n <= number]

    # -- what is known --------------------------------------------------------------------------------------------

    @property
    def behind(self) -> bool:
        """Whether so many looks are out that the text should not go on; what came back is judged first."""
        if len(self.pending) >= MOST_PENDING or self._behind:
            self.poll()
            self._behind = len(self.pending) > (MOST_PENDING // 2 if self._behind else MOST_PENDING - 1)
        return self._behind

    @property
    def stop(self) -> Stop | None:
        """Where the text ends, once no earlier look can say otherwise."""
        return self._candidate if not self.pending else None

    @property
    def frontier(self) -> int:
        """Text before it may leave. It never passes where the rules were at the first look that is out."""
        places = [watcher.frontier for watcher in self.watchers]
        places += [look.limit for look in self.pending if look.watcher.watch.holds][:1]
        if self._candidate is not None:
            places.append(self._candidate.limit)
        return min(places)

    @property
    def settled(self) -> int:
        return min(watcher.settled for watcher in self.watchers)

    def take(self) -> list[Hit]:
        """Reports that no earlier look can make void."""
        first = min((look.number for look in self.pending if look.watcher.watch.action != "flag"), default=self._count)
        if self._candidate is not None:
            first = min(first, self._candidate.number)
        ready = [hit for number, hit in self._found if number <= first]
        self._found = [(number, hit) for number, hit in self._found if number > first]
        return ready

    # -- keeping --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Waits for what is out."""
        self.poll(most=0)
        return {
            "prompt": self.prompt,
            "watchers": [watcher.state() for watcher in self.watchers],
            "count": self._count,
            "found": [[number, list(hit)] for number, hit in self._found],
            "candidate": None if self._candidate is None else [list(self._candidate.hit), *self._candidate[1:]],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.prompt, self._count = saved["prompt"], saved["count"]
        for watcher, one in zip(self.watchers, saved["watchers"], strict=True):
            watcher.restore(one)
        self._found = [(number, Hit(*hit)) for number, hit in saved["found"]]
        if (candidate := saved["candidate"]) is not None:
            self._candidate = Stop(Hit(*candidate[0]), *candidate[1:])
