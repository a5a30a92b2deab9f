"""Compare: the same facts edited, or remembered, by several methods, one at a time, judged by the same protocols."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gnomon.edit.api import edit, remember
from gnomon.edit.evaluation import evaluate, means
from gnomon.edit.facts import Fact
from gnomon.edit.patched import Change
from gnomon.edit.remembering import memory_methods
from gnomon.edit.table import Table, table
from gnomon.errors import EditError
from gnomon.progress import progress

if TYPE_CHECKING:
    from gnomon.model import Model


def compare_methods(
    model: Model, facts: Sequence[Fact], names: Sequence[str], protocols: Sequence[str] = ("wild",)
) -> Table:
    """One row per method and protocol: each fact edited alone, means over facts with 95 % intervals.

    A fact that a method could not edit counts as failed in every criterion but locality, and is named in the details.
    """
    gathered: dict[tuple[str, str], list[dict[str, Any]]] = {(n, p): [] for n in names for p in protocols}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    details: list[dict[str, Any]] = []
    with progress("facts", len(facts) * len(names)) as bar:
        for fact in facts:
            for name in names:
                started = time.perf_counter()
                try:
                    patch = change(model, fact, name)
                except EditError as error:
                    details.append({"method": name, "fact": fact.prompt, "failed": str(error)})
                    for protocol in protocols:
                        failed = {"reliability": 0.0, "generalization": 0.0, "locality": 1.0, "chat": 0.0}
                        gathered[name, protocol].append(failed)
                    continue
                finally:
                    seconds[name].append(time.perf_counter() - started)
                    bar.advance()
                judged = evaluate(model, patch, [fact], protocols)
                for row in judged:
                    gathered[name, row["protocol"]].append(dict(row))
                details += [{"method": name, **detail} for detail in judged.details]
    rows = [
        {"method": name, "protocol": protocol, **means(found), "seconds": f"{_median(seconds[name]):.1f}"}
        for (name, protocol), found in gathered.items()
    ]
    return table(rows, details)


def change(model: Model, fact: Fact, name: str) -> Change:
    """The fact edited or remembered, whichever the method does."""
    if name in memory_methods():
        return remember(model, fact, method=name, report=False)
    return edit(model, fact, method=name, report=False)


def _median(values: Sequence[float]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
