"""Findings in the making: hits of one rule that overlap are one finding, told once nothing can extend it any more.

Hits in, by where they begin; findings out. Knows nothing of text, nor of what leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.guard.finding import Finding
from gnomon.guard.lane import Hit


@dataclass(frozen=True)
class Bound:
    """A rule as a policy uses it. number's meaning for Hits: its place in the guard's list of these."""

    name: str
    action: str
    replacement: str
    entity: str = ""


@dataclass(slots=True)
class _Open:
    """A finding that later matches of its rule may still extend."""

    start: int
    end: int
    score: float
    note: str


class Reports:
    """All findings of one text. shadow: every rule only flags."""

    def __init__(self, rules: Sequence[Bound], shadow: bool) -> None:
        self.rules = rules
        self.shadow = shadow
        self.found: list[Finding] = []
        self._open: dict[int, _Open] = {}
        self._fresh: list[Finding] = []  # not told yet

    def add(self, hit: Hit) -> None:
        known = self._open.get(hit.number)
        if known is not None:
            if hit.start < known.end:
                known.end, known.score = max(known.end, hit.end), max(known.score, hit.score)
                return
            self._close(hit.number, known)
        self._open[hit.number] = _Open(hit.start, hit.end, hit.score, hit.note)

    def close(self, before: int | None) -> tuple[Finding, ...]:
        """Findings that nothing can extend any more (all, for None) -> those not told yet."""
        if not self._open and not self._fresh:
            return ()
        for number, one in [*self._open.items()]:
            if before is None or one.end <= before:
                del self._open[number]
                self._close(number, one)
        told, self._fresh = self._fresh, []
        return tuple(sorted(told)) if told else ()

    def all(self) -> list[Finding]:
        """In the order of the text."""
        return sorted(self.found + [self._finding(number, one) for number, one in self._open.items()])

    def _close(self, number: int, one: _Open) -> None:
        finding = self._finding(number, one)
        self.found.append(finding)
        self._fresh.append(finding)

    def _finding(self, number: int, one: _Open) -> Finding:
        bound = self.rules[number]
        return Finding(one.start, one.end, bound.name, "flag" if self.shadow else bound.action, one.score, one.note)

    def state(self) -> dict[str, Any]:
        return {
            "open": [[n, o.start, o.end, o.score, o.note] for n, o in self._open.items()],
            "found": [[f.start, f.end, f.rule, f.action, f.score, f.note] for f in self.found],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        self._open = {n: _Open(*rest) for n, *rest in saved["open"]}
        self.found = [Finding(*one) for one in saved["found"]]
