"""Word lists with weights as a score: what several unvalidated baselines share. Written by us; small on purpose."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)?")


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def weighed(text: str, weights: Mapping[str, float]) -> float:
    """1 - the product of (1 - weight) over the words found: one strong word is enough, weak ones add up."""
    doubt = 1.0
    lowered = text.lower()
    found = set(words(lowered))
    for entry, weight in weights.items():
        if entry in found or (" " in entry and re.search(rf"\b{re.escape(entry)}\b", lowered)):
            doubt *= 1 - weight
    return 1 - doubt


@cache
def parse(table: str) -> dict[str, float]:
    """ "0.9: word, two words" lines as a mapping."""
    weights: dict[str, float] = {}
    for line in table.strip().splitlines():
        weight, _, entries = line.partition(":")
        weights |= {entry.strip(): float(weight) for entry in entries.split(",") if entry.strip()}
    return weights
