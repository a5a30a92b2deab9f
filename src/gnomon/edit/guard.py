"""Guard against collapse: after every edit of a sequence the model's perplexity on ordinary text is compared with what
it was before the first; an edit that raises it too far is taken back.

Perplexity on fixed texts tracks general ability (arXiv 2402.09656). In go a model and facts; out comes the patch of
what was kept, with a record per edit. Knows methods by name only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

from gnomon.edit.api import edit
from gnomon.edit.facts import Fact
from gnomon.edit.patched import wearing
from gnomon.errors import EditError, UsageError
from gnomon.models.patch import Patch

if TYPE_CHECKING:
    from gnomon.model import Model

TEXTS = (
    "The river runs through the old town and under three bridges before it reaches the sea.",
    "Water boils at one hundred degrees at sea level, and at less on a high mountain.",
    "In 1969 two astronauts walked on the Moon while a third stayed in orbit around it.",
    "The committee meets on Mondays, and its members are elected for two years by all citizens.",
    "To bake bread one needs flour, water, salt and yeast, some patience and a hot oven.",
    "He was born in Lisbon, studied medicine in Paris and worked as a doctor in Brazil.",
    "Many birds leave in autumn, fly south for the winter, and come back to nest in spring.",
    "Mathematics is the study of numbers, shapes and patterns, and of how they change.",
)
"""Ordinary sentences, written for this purpose; give your own for a real probe."""


@dataclass(frozen=True)
class Guard:
    """most: perplexity may grow by this factor over the unedited model's. texts: on what it is taken."""

    most: float = 1.10
    texts: tuple[str, ...] = TEXTS

    def __post_init__(self) -> None:
        if self.most < 1 or not self.texts:
            raise UsageError("A guard needs texts and a factor of at least 1.", param="guard")


@dataclass
class Edited:
    """What came of a sequence of edits. patch: all that was kept; None when nothing was. records: one per edit."""

    patch: Patch | None = None
    records: list[dict[str, Any]] = field(default_factory=list)


def perplexity(model: Model, texts: Sequence[str] = TEXTS) -> float:
    """exp of the mean -log p per token over the texts, each on its own."""
    total, count = 0.0, 0
    for text in texts:
        ids = model.encode(text)
        logp = torch.log_softmax(model.logits(ids)[:-1], -1)
        picked = logp.gather(1, torch.tensor(ids[1:])[:, None])
        total -= float(picked.sum())
        count += len(ids) - 1
    return math.exp(min(total / max(count, 1), 700.0))


def edit_sequence(
    model: Model,
    facts: Sequence[Fact],
    *,
    method: str = "rome",
    guard: Guard | None = None,
    batch: int = 1,
    told: Callable[[dict[str, Any]], None] | None = None,
    **hyper: Any,
) -> Edited:
    """Edit fact after fact (or batch after batch), each on the model as the ones before left it.

    An edit after which perplexity exceeds the guard's limit, or that fails, is taken back and the sequence goes on.
    told: called with each record as it comes.
    """
    watch = guard or Guard()
    limit = watch.most * perplexity(model, watch.texts)
    done = Edited()
    for start in range(0, len(facts), batch):
        group = list(facts[start : start + batch])
        record: dict[str, Any] = {"facts": [fact.prompt for fact in group], "kept": False, "perplexity": None}
        done.records.append(record)
        try:
            with wearing(model, done.patch) as edited:
                added = edit(edited, group, method=method, report=False, **hyper)
            total = added if done.patch is None else joined(done.patch, added)
            with wearing(model, total) as edited:
                record["perplexity"] = perplexity(edited, watch.texts)
        except EditError as error:
            record["failed"] = str(error)
        else:
            if record["perplexity"] <= limit:
                record["kept"], done.patch = True, total
        if told is not None:
            told(record)
    return done


def joined(before: Patch, added: Patch) -> Patch:
    """Two edits as one; what the later one must remember (attachments) stays."""
    total = before + added
    facts = [*before.metadata.get("facts", []), *added.metadata.get("facts", [])]
    metadata = {**added.metadata, "facts": facts}
    report = {"facts": [*before.report.get("facts", []), *added.report.get("facts", [])]}
    return replace(total, metadata=metadata, report=report, attachments=added.attachments)
