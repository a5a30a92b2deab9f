"""Ensembles of segments and of whole answers: models that take turns or are voted on, instead of mixing their tokens.

Plain functions over loaded Models, for raw prompts. `cool_fusion` (arXiv 2407.19807): every model proposes the next
words, all score every proposal, the likeliest on average wins; with `rate` above 0 a winner's vote grows
(SpecFuse, arXiv 2412.07380). `best_of`: the same for whole answers. `majority` (self-consistency, arXiv 2203.11171):
the answer given most often. Scores are bits per byte, so that tokenizers do not matter.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.ensemble.ranker import PairRanker
from gnomon.errors import UsageError
from gnomon.generation import Generation
from gnomon.model import Model

NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class Answer:
    """The text, and who wrote each part: (model name, text, mean bits per byte)."""

    text: str
    parts: tuple[tuple[str, str, float], ...]


def bits_of(models: Sequence[Model], weights: Sequence[float], prompt: str, text: str) -> float:
    """Mean bits per byte that models spend on a text after a prompt."""
    size = len(text.encode("utf-8"))
    return sum(
        -w * model.score(prompt, text).logprob / math.log(2) / size for w, model in zip(weights, models, strict=True)
    )


def cool_fusion(
    models: Sequence[Model],
    prompt: str,
    *,
    max_segments: int = 16,
    segment_tokens: int = 8,
    rate: float = 0.0,
    **options: Any,
) -> Answer:
    """Segments up to a word's end, each from the model whose proposal all find likeliest; ends when that one does."""
    _needs(models)
    weights = [1 / len(models)] * len(models)
    text, parts = "", []
    for _ in range(max_segments):
        proposals = [_segment(model, prompt + text, segment_tokens, options) for model in models]
        costs = [bits_of(models, weights, prompt + text, p) if p else math.inf for p, _ in proposals]
        best = min(range(len(models)), key=costs.__getitem__)
        piece, ended = proposals[best]
        if not piece:
            break
        text += piece
        parts.append((models[best].name, piece, costs[best]))
        grown = [w * math.exp(rate * (place == best)) for place, w in enumerate(weights)]
        weights = [w / sum(grown) for w in grown]
        if ended:
            break
    return Answer(text, tuple(parts))


def best_of(
    models: Sequence[Model], prompt: str, *, n: int = 1, ranker: PairRanker | None = None, **options: Any
) -> Answer:
    """n answers of each model, scored by all; the one of fewest bits per byte, or the one that the ranker prefers."""
    _needs(models)
    weights = [1 / len(models)] * len(models)
    found = []
    for model in models:
        for generation in _generations(model, prompt, n, options):
            if generation.text:
                found.append((bits_of(models, weights, prompt, generation.text), model.name, generation.text))
    if not found:
        raise UsageError("Every answer was empty.", hint="Raise max_tokens, or set min_tokens.")
    cost, name, text = min(found)
    if ranker is not None:
        cost, name, text = found[ranker.best(prompt, [text for _, _, text in found])]
    return Answer(text, ((name, text, cost),))


def majority(
    models: Sequence[Model],
    prompt: str,
    *,
    n: int = 5,
    answer: Callable[[str], str | None] | None = None,
    **options: Any,
) -> Answer:
    """n sampled answers of each model; the most frequent one wins, the likelier among equals.

    answer: what of a text counts as its answer (None: it has none); default: its last number, or the whole text.
    """
    _needs(models)
    key = answer or last_number
    texts = [(key(g.text), m.name, g.text) for m in models for g in _generations(m, prompt, n, options)]
    counts = Counter(found for found, _, _ in texts if found)
    if not counts:
        raise UsageError("No text holds an answer.", hint="Give `answer`, a function from a text to its answer.")
    most = max(counts.values())
    weights = [1 / len(models)] * len(models)
    first = {found: (name, text) for found, name, text in reversed(texts) if found and counts[found] == most}
    costs = {found: bits_of(models, weights, prompt, text) for found, (_, text) in first.items()}
    best = min(first, key=lambda found: (costs[found], found))
    name, text = first[best]
    return Answer(best, ((name, text, costs[best]),))


def last_number(text: str) -> str | None:
    """The last number of a text without its commas; a text without numbers is its own answer."""
    numbers = NUMBER.findall(text)
    return numbers[-1].replace(",", "") if numbers else text.strip() or None


def _needs(models: Sequence[Model]) -> None:
    if not models:
        raise UsageError("No models were given.", hint="Give a list of loaded models.")


def _generations(model: Model, prompt: str, n: int, options: dict[str, Any]) -> list[Generation]:
    return model.submit(prompt, {**options, "n": n}).collect()


def _segment(model: Model, prompt: str, tokens: int, options: dict[str, Any]) -> tuple[str, bool]:
    """The next words, cut where a word ends; whether the text is over with them."""
    (generation,) = _generations(model, prompt, 1, {**options, "max_tokens": tokens})
    if generation.finish_reason == "stop":
        return generation.text, True
    cut = max((m.start() for m in re.finditer(r"\s", generation.text)), default=0)
    return (generation.text[:cut] if cut else generation.text), False
