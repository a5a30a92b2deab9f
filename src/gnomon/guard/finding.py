"""What a guard found, and the result of a scan. Plain values that never hold the text that was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

ACTIONS = ("redact", "block", "replace", "flag", "vault")


class Finding(NamedTuple):
    """One finding: which rule, where in the canonical text, what was done. Prints the same whatever the split."""

    start: int
    end: int
    rule: str
    action: str = "redact"
    score: float = 1.0
    note: str = ""

    def __str__(self) -> str:
        note = f" ({self.note})" if self.note else ""
        return f"{self.rule} [{self.start}, {self.end}) {self.action} {self.score:g}{note}"

    def as_dict(self) -> dict[str, Any]:
        plain = {
            "rule": self.rule,
            "start": self.start,
            "end": self.end,
            "action": self.action,
            "score": round(self.score, 4),
        }
        return plain | ({"note": self.note} if self.note else {})


@dataclass(frozen=True)
class Result:
    """A scanned text. valid: nothing but flags was found. Unpacks as (text, valid, risk), as llm-guard's results do."""

    text: str
    valid: bool
    risk: float
    findings: tuple[Finding, ...] = ()
    verdict: str = "pass"

    def __iter__(self) -> Iterator[Any]:
        return iter((self.text, self.valid, self.risk))
