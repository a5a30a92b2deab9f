"""What one push of a guarded text did, and how grave what was found is. Knows nothing of how it is decided."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from gnomon.guard.finding import Finding

CHANGES = {"redact", "replace", "vault"}


class Step(NamedTuple):
    """What one push did. hidden: spans of the text that were replaced; settled: text before it is decided."""

    text: str = ""
    settled: int = 0
    hidden: tuple[tuple[int, int], ...] = ()
    findings: tuple[Finding, ...] = ()
    cut: int | None = None


def joined(steps: Iterable[Step]) -> Step:
    """Several steps as one."""
    many = list(steps)
    return Step(
        "".join(step.text for step in many),
        many[-1].settled if many else 0,
        tuple(span for step in many for span in step.hidden),
        tuple(finding for step in many for finding in step.findings),
        next((step.cut for step in many if step.cut is not None), None),
    )


def verdict_of(findings: Iterable[Finding]) -> str:
    """The gravest of what the findings did: "pass" | "flag" | "redact" | "block" | "guard_error"."""
    verdict = "pass"
    for finding in findings:
        if finding.action == "block":
            if finding.rule == "guard_error":
                return "guard_error"
            verdict = "block"
        elif verdict != "block":
            verdict = "redact" if verdict == "redact" or finding.action in CHANGES else "flag"
    return verdict
