"""One measure for models, merges and ensembles: bits per byte of texts and accuracy on multiple-choice items.

Every reference is its members and their weights; members are opened one after another and each scored once, byte by
byte, so that other tokenizers are compared fairly; an ensemble is the arithmetic mixture in byte space. Intervals are
paired bootstraps over texts or items: all references are resampled together. Knows nothing of terminals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.ensemble.ensemble import Ensemble
from gnomon.ensemble.options import MemberOptions
from gnomon.ensemble.resolving import members_of
from gnomon.ensemble.scoring import mixed
from gnomon.ensemble.trie import Floats
from gnomon.errors import UsageError

RESAMPLES = 2000
PRUNE = 1e-4
"""Covers below this share are dropped when scoring."""
LETTERS = "ABCDEFGH"


@dataclass(frozen=True)
class Item:
    """One question with its choices and the place of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int

    @classmethod
    def parse(cls, entry: Mapping[str, Any], where: str) -> Item:
        """{"question", "A", "B", ..., "answer": "C"}, as ARC and MMLU are often stored."""
        letters = [letter for letter in LETTERS if letter in entry]
        if not isinstance(entry.get("question"), str) or len(letters) < 2 or entry.get("answer") not in letters:
            raise UsageError(f"{where}: no item of the form question, A, B, ..., answer.", param="items")
        choices = tuple(f" {entry[letter]}" for letter in letters)
        return cls(f"Question: {entry['question']}\nAnswer:", choices, letters.index(entry["answer"]))


@dataclass
class Contender:
    """A reference: who speaks in it, with which votes."""

    name: str
    members: list[str | MemberOptions]
    weights: list[float]
    bits: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def compare(
    refs: Sequence[str],
    texts: Sequence[str],
    items: Sequence[Item] = (),
    *,
    seed: int = 0,
    advance: Callable[[], None] = lambda: None,
    **opening: Any,
) -> dict[str, Any]:
    """Rows of name, bits per byte and accuracy, each with a 95 % interval and the paired difference to the best.

    opening: profile, threads for every member. Raises UsageError for no texts and no items.
    """
    if not texts and not items:
        raise UsageError("Nothing to compare on.", hint="Give --text FILE or --items FILE.jsonl.", param="text")
    contenders = [Contender(ref, *members_of(ref)) for ref in refs]
    for contender in contenders:
        if not contender.members:
            raise UsageError(f"`{contender.name}` names no model.", param="refs")
    scored: dict[str, tuple[list[Floats], list[list[Floats]]]] = {}
    for member in {_key(m): m for c in contenders for m in c.members}.values():
        single = Ensemble([member], core="byte", prune=PRUNE, ledger=False, **opening)
        with single:
            scored[_key(member)] = _scores(single, texts, items, advance)
    for contender in contenders:
        _judge(contender, [scored[_key(m)] for m in contender.members], items)
    lengths = np.array([len(text.encode("utf-8")) for text in texts])
    report: dict[str, Any] = {"texts": len(texts), "bytes": int(lengths.sum()), "items": len(items), "rows": []}
    for contender in contenders:
        row: dict[str, Any] = {"name": contender.name}
        if texts:
            row["bits_per_byte"] = _interval(np.array(contender.bits), lengths, seed)
        if items:
            row["accuracy"] = _interval(np.array(contender.right, dtype=float), np.ones(len(items)), seed)
        report["rows"].append(row)
    _add_differences(report, contenders, lengths, len(items), seed)
    return report


def _key(member: str | MemberOptions) -> str:
    return member if isinstance(member, str) else member.model_dump_json(exclude={"weight", "name", "primary"})


def _scores(
    single: Ensemble, texts: Sequence[str], items: Sequence[Item], advance: Callable[[], None]
) -> tuple[list[Floats], list[list[Floats]]]:
    """Probabilities of every byte: of the texts, and of every choice of every item."""

    def of(text: str, prompt: str = "") -> Floats:
        (values,) = single.byte_probabilities(text, prompt).values()
        return np.array(values[:-1])

    found: list[Floats] = []
    for text in texts:
        found.append(of(text))
        advance()
    by_item = []
    for item in items:
        by_item.append([of(choice, item.prompt) for choice in item.choices])
        advance()
    return found, by_item


def _judge(contender: Contender, scores: Sequence[Any], items: Sequence[Item]) -> None:
    """Bits of each text and whether each item was answered rightly (the choice of fewest bits per byte)."""
    texts = zip(*(texts for texts, _ in scores), strict=True)
    contender.bits = [float(-np.log2(mixed(list(text), contender.weights)).sum()) for text in texts]
    for item, by_member in zip(items, zip(*(items for _, items in scores), strict=True), strict=True):
        costs = [
            float(-np.log2(mixed(list(choice), contender.weights)).mean()) for choice in zip(*by_member, strict=True)
        ]
        contender.right.append(int(np.argmin(costs)) == item.answer)


def _resampled(values: Floats, sizes: Floats, seed: int) -> Floats:
    """sum(values) / sum(sizes) of resampled units; the same units for the same seed, whatever the values."""
    draws = np.random.default_rng(seed).integers(0, len(values), (RESAMPLES, len(values)))
    found: Floats = values[draws].sum(axis=1) / sizes[draws].sum(axis=1)
    return found


def _interval(values: Floats, sizes: Any, seed: int) -> dict[str, float]:
    samples = _resampled(values, sizes, seed)
    low, high = np.percentile(samples, [2.5, 97.5])
    return {"value": float(values.sum() / sizes.sum()), "low": float(low), "high": float(high)}


def _add_differences(report: dict[str, Any], contenders: list[Contender], lengths: Any, items: int, seed: int) -> None:
    """To the best reference, paired: an interval without 0 is a difference that is no chance."""
    measures = []
    if len(lengths):
        measures.append(("bits_per_byte", [np.array(c.bits) for c in contenders], lengths, min))
    if items:
        right = [np.array(c.right, dtype=float) for c in contenders]
        measures.append(("accuracy", right, np.ones(items), max))
    for name, values, sizes, choose in measures:
        totals = [float(v.sum()) for v in values]
        best = totals.index(choose(totals))
        for place, row in enumerate(report["rows"]):
            row[f"{name}_to_best"] = _interval(values[place] - values[best], sizes, seed)


def svg(report: Mapping[str, Any]) -> str:
    """The report as a picture: one row a reference, a dot and its interval per measure."""
    measures = [m for m in ("bits_per_byte", "accuracy") if m in report["rows"][0]]
    height, left, width = 28 * len(report["rows"]) + 40, 260, 300
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + (width + 40) * len(measures)}" height="{height}" '
        'font-family="sans-serif" font-size="13">'
    ]
    for column, measure in enumerate(measures):
        cells = [row[measure] for row in report["rows"]]
        low, high = min(c["low"] for c in cells), max(c["high"] for c in cells)
        span = (high - low) or 1.0
        at = left + column * (width + 40)
        parts.append(f'<text x="{at}" y="18">{measure.replace("_", " ")} ({low:.3f} .. {high:.3f})</text>')
        for place, cell in enumerate(cells):
            y = 44 + 28 * place
            x1, x2, x = (at + width * (cell[key] - low) / span for key in ("low", "high", "value"))
            parts.append(f'<line x1="{x1:.1f}" y1="{y}" x2="{x2:.1f}" y2="{y}" stroke="#888" stroke-width="2"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="#246"/>')
    for place, row in enumerate(report["rows"]):
        name = str(row["name"]).replace("&", "&amp;").replace("<", "&lt;")
        parts.append(f'<text x="4" y="{48 + 28 * place}">{name[:36]}</text>')
    return "\n".join([*parts, "</svg>\n"])


def read_texts(path: Path) -> list[str]:
    """A text file: one text per paragraph."""
    found = [part.strip() for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    if not found:
        raise UsageError(f"{path} holds no text.", param="text")
    return found


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """A .jsonl file of items, the first `limit` of them."""
    import json

    found: list[Item] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if limit is not None and len(found) >= limit:
            break
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not JSON: {error}.", param="items") from None
        found.append(Item.parse(entry, f"{path}, line {number}"))
    return found
