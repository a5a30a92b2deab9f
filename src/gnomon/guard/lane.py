"""One view of a text with the rules that look at it: feeds a Matcher and maps what it finds back to the text.

Text in; findings of rules in the text's own places out. Knows nothing of actions or of other views.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gnomon.guard.automaton import Program
from gnomon.guard.matcher import MAX_HOLD, Match
from gnomon.guard.rules import Rule
from gnomon.guard.views import VIEWS
from gnomon.guard.walking import make_matcher


@dataclass(frozen=True)
class Plan:
    """What a lane needs of the guard: rules with their numbers in the whole guard, and the compiled program."""

    view: str
    rules: tuple[Rule, ...]
    numbers: tuple[int, ...]
    program: Program
    overflow: Mapping[int, str]
    urgent: bool
    max_hold: int = MAX_HOLD


class Hit(NamedTuple):
    """A rule (its number in the guard) and where in the text."""

    start: int
    end: int
    number: int
    overflow: bool = False
    score: float = 1.0
    note: str = ""


def _unasked(rule: int, start: int, end: int) -> bool:
    """Of a program without urgent rules nobody asks; a method here would tie lane and matcher into a cycle."""
    return True


class Lane:
    """The running state of one view."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.urgent = plan.urgent
        self.view = None if plan.view == "raw" else VIEWS[plan.view]()
        self.matcher = make_matcher(
            plan.program, plan.max_hold, self._passes if plan.urgent else _unasked, plan.overflow
        )
        self.position = 0  # characters of the text seen
        self.text = ""  # of the view, from `base` on
        self.base = 0
        self.starts: list[int] = []  # of the view's characters from `base` on, in the text
        self.ends: list[int] = []
        self.run_places: dict[int, int] = {}  # where runs that outgrew the limit begin: view -> text

    def _passes(self, rule: int, start: int, end: int) -> bool:
        check = self.plan.rules[rule].check
        return check is None or check(self.text[start - self.base : end - self.base])

    def feed(self, text: str) -> None:
        place, self.position = self.position, self.position + len(text)
        if self.view is None:
            self.text += text
        else:
            pieces = [piece for i, c in enumerate(text) for piece in self.view.push(c, place + i)]
            self._add(pieces)
            text = "".join(piece[0] for piece in pieces)
        self.matcher.feed(text)

    def _add(self, pieces: Sequence[tuple[str, int, int]]) -> None:
        self.text += "".join(piece[0] for piece in pieces)
        self.starts += [piece[1] for piece in pieces]
        self.ends += [piece[2] for piece in pieces]

    def whole(self, text: str) -> None:
        """All of a text at once: feed and finish."""
        if self.view is None:
            self.text, self.position = text, len(text)
            self.matcher.feed(text, last=True)
        else:
            self.feed(text)
            self.finish()

    def finish(self) -> None:
        if self.matcher.finished:
            return
        if self.view is not None and self.matcher.stopped is None:
            pieces = self.view.finish()
            self._add(pieces)
            self.matcher.feed("".join(piece[0] for piece in pieces))
        self.matcher.finish()

    @property
    def frontier(self) -> int:
        """No finding that holds text back and is not known yet begins before here."""
        if self.view is None:
            return self.matcher.frontier
        place = self.matcher.frontier - self.base
        pending = self.position if self.view.pending is None else self.view.pending
        return min(self.starts[place], pending) if place < len(self.starts) else pending

    @property
    def settled(self) -> int:
        """No finding at all that is not known yet begins before here."""
        place = self.matcher.first_start
        if self.view is None:
            return place
        pending = self.position if self.view.pending is None else self.view.pending
        return min(self.starts[place - self.base], pending) if place - self.base < len(self.starts) else pending

    @property
    def stopped(self) -> Hit | None:
        return None if self.matcher.stopped is None else self._hit(self.matcher.stopped)

    @property
    def runs(self) -> list[Hit]:
        """Runs that outgrew the limit and still grow."""
        return [self._hit(Match(run.start, run.end, run.rule, True)) for run in self.matcher.runs]

    def take(self) -> list[Hit]:
        """Findings that are final, passed their check and were not taken yet."""
        found = []
        for match in self.matcher.take():
            if match.overflow or self._passes(match.rule, match.start, match.end):
                found.append(self._hit(match))
        self._trim()
        return found

    def _hit(self, match: Match) -> Hit:
        number = self.plan.numbers[match.rule]
        if self.view is None:
            return Hit(match.start, match.end, number, match.overflow)
        start = self.run_places.get(match.start)
        start = self.starts[match.start - self.base] if start is None else start
        return Hit(start, self.ends[match.end - 1 - self.base], number, match.overflow)

    def _trim(self) -> None:
        """Forget text that no open match needs, now and then."""
        if self.matcher.finished:
            return
        if self.view is None and not self.matcher.runs:
            oldest = self.matcher.oldest
            if (drop := oldest - self.base) > 256 or (drop > 0 and drop == len(self.text)):
                self.text, self.base = self.text[drop:], oldest
            return
        runs = {run.start: run.end for run in self.matcher.runs}
        if self.view is not None:
            self.run_places = {
                start: self.run_places[start] if start in self.run_places else self.starts[start - self.base]
                for start in runs
            }
        oldest = min([self.matcher.oldest, *(end - 1 for end in runs.values())])
        if (drop := oldest - self.base) > 256 or (drop > 0 and drop == len(self.text)):
            self.text = self.text[drop:]
            del self.starts[:drop], self.ends[:drop]
            self.base = oldest

    def state(self) -> dict[str, Any]:
        return {
            "position": self.position,
            "text": self.text,
            "base": self.base,
            "starts": self.starts,
            "ends": self.ends,
            "run_places": list(self.run_places.items()),
            "view": None if self.view is None else self.view.state(),
            "matcher": self.matcher.state(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self.position, self.text, self.base = saved["position"], saved["text"], saved["base"]
        self.starts, self.ends = list(saved["starts"]), list(saved["ends"])
        self.run_places = dict(saved["run_places"])
        if self.view is not None:
            self.view.restore(saved["view"])
        self.matcher.restore(saved["matcher"])
