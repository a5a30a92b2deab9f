"""Protocols: how it is decided whether a model "knows" something, from text alone. Pure functions; no model here.

Four are in use, and they disagree: `wild` (free generation, what a user sees; the default), `length` (generation cut at
the target's length), `teacher` (argmax of each target token, given the ones before) and `probability` (target against
old answer). Every number names its protocol.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from gnomon.edit.facts import normalised

PROTOCOLS = ("wild", "length", "teacher", "probability")


def answer(text: str) -> str:
    """The first sentence or line of a generation: what WILD (arXiv 2502.11177) judges."""
    first = text.strip().split("\n")[0]
    return re.split(r"(?<=[.!?。！？])(?:\s|$)", first, maxsplit=1)[0]


def says(text: str, answers: Sequence[str]) -> bool:
    """Whether the first sentence holds one of the answers, as whole words, whatever the case and punctuation."""
    said = answer(text)
    return any(_holds(said, wanted) for wanted in answers if wanted.strip())


def _holds(said: str, wanted: str) -> bool:
    if any(ord(character) > 0x2E80 for character in wanted):  # scripts without spaces: a part of the text
        return wanted.strip() in said
    plain = normalised(wanted)
    if not plain:  # an answer of nothing but articles and punctuation
        return wanted.strip().lower() in said.lower()
    return f" {plain} " in f" {normalised(said)} "


def kept(before: str, after: str, target: str, right: str | None) -> bool:
    """Whether a neighbour kept its answer: no new word of the edit's target, and a right answer stays right."""
    leaked = says(after, (target,)) and not says(before, (target,))
    lost = right is not None and says(before, (right,)) and not says(after, (right,))
    return not leaked and not lost


def ngram_entropy(text: str) -> float:
    """GE of ROME: entropy of bigrams (weight 2/3) and trigrams (4/3), mean, in bits, times 100. Words: by spaces."""
    words = text.split()

    def entropy(size: int) -> float:
        grams = Counter(tuple(words[i : i + size]) for i in range(len(words) - size + 1))
        total = sum(grams.values())
        return -sum(n / total * math.log2(n / total) for n in grams.values()) if total else 0.0

    return 100 * (entropy(2) * 2 / 3 + entropy(3) * 4 / 3) / 2


def harmonic(values: Sequence[float]) -> float:
    """Harmonic mean, 0 when one is 0: the papers' overall score."""
    return 0.0 if any(value <= 0 for value in values) else len(values) / sum(1 / value for value in values)


def interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of a mean (normal approximation)."""
    count = len(values)
    if count < 2:
        return float("nan")
    mean = sum(values) / count
    return 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / (count - 1) / count)
