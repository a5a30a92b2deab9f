"""Edits joined: several patches or memories as one, after a look at whether their facts contradict each other."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any

from gnomon.edit.facts import normalised, same_answer
from gnomon.edit.guard import joined
from gnomon.edit.memory import Memory
from gnomon.edit.patched import Change
from gnomon.errors import UsageError
from gnomon.models.patch import Patch


def join_edits(changes: Sequence[Change], *, latest: bool = False) -> Change:
    """The sum of edits of one model, in order. latest: of two that contradict each other the later one is kept whole,
    the earlier one left out whole; without it they are refused.

    Raises UsageError naming the facts, WrongBase for edits of different models.
    """
    if not changes:
        raise UsageError("No edits were given.", param="patches")
    kept: list[Change] = []
    for change in changes:
        quarrels = [(other, pair) for other in kept if (pair := contradiction(other, change)) is not None]
        if quarrels and not latest:
            old, new = quarrels[0][1]
            raise UsageError(
                f"Two edits contradict each other: `{old['prompt']}` -> `{old['target']}` and -> `{new['target']}`.",
                hint="Keep one of them, or say `--latest` (in Python, latest=True).",
                param="patches",
            )
        losers = [id(other) for other, _ in quarrels]
        kept = [other for other in kept if id(other) not in losers] + [change]
    if all(isinstance(one, Patch) for one in kept):
        return reduce(joined, kept)  # type: ignore[arg-type]
    if all(isinstance(one, Memory) for one in kept):
        return reduce(lambda a, b: a + b, kept)  # type: ignore[operator]
    raise UsageError("Patches and memories cannot become one file: a patch changes weights, a memory the prompt.")


def contradiction(one: Change, other: Change) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """The first two facts that ask the same and answer differently."""
    known = {normalised(fact["prompt"]): fact for fact in facts_of(one)}
    for fact in facts_of(other):
        old = known.get(normalised(fact["prompt"]))
        if old is not None and not same_answer(old["target"], fact["target"]):
            return old, fact
    return None


def facts_of(change: Change) -> list[dict[str, Any]]:
    """An edit's facts as records."""
    if isinstance(change, Memory):
        return [fact.as_dict() for fact in change.facts]
    return list(change.metadata.get("facts", ()))
