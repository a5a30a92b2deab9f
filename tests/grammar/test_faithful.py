"""Drawing from the model's own distribution: exact against enumeration, and through the engine."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest

from gnomon.errors import GrammarError
from gnomon.grammar import faithful, select
from gnomon.grammar.faithful import Attempts
from gnomon.model import Model

LETTERS = 3
END = 3
LONGEST = 3


def logits_of(text: tuple[int, ...]) -> Any:
    """A small language model: a fixed random row for each text."""
    return _row(text).copy()


@cache
def _row(text: tuple[int, ...]) -> Any:
    seed = [7, *text]
    return np.random.default_rng(seed).normal(scale=1.5, size=LETTERS + 1).astype(np.float32)


def allowed_after(text: tuple[int, ...]) -> Any:
    """The grammar: an even number of letter 0, no two equal letters in a row, at most LONGEST letters."""
    allowed_V = np.zeros(LETTERS + 1, dtype=np.bool_)
    if len(text) < LONGEST:
        allowed_V[[letter for letter in range(LETTERS) if not text or text[-1] != letter]] = True
    allowed_V[END] = text.count(0) % 2 == 0
    return allowed_V


def probability(text: tuple[int, ...], temperature: float) -> float:
    """Of a text and its end, by the model alone."""
    found = 1.0
    for place in range(len(text) + 1):
        row_V = np.exp(logits_of(text[:place]).astype(np.float64) / temperature)
        found *= row_V[text[place] if place < len(text) else END] / row_V.sum()
    return found


def valid(text: tuple[int, ...]) -> bool:
    return all(allowed_after(text[:n])[text[n]] for n in range(len(text))) and bool(allowed_after(text)[END])


def drawn(attempts: Attempts, rng: np.random.Generator) -> tuple[int, ...]:
    text: tuple[int, ...] = ()
    while True:
        row_V, allowed_V = logits_of(text), allowed_after(text)
        attempts.weigh(row_V, allowed_V)
        token = int((row_V / attempts.temperature + rng.gumbel(size=row_V.size)).argmax())
        attempts.took(token)
        if not allowed_V[token]:
            attempts.fail(dead=False)
            text = ()
        elif token == END:
            attempts.here = attempts.root
            return text
        else:
            text = (*text, token)
            if len(text) > LONGEST:
                attempts.fail(dead=True)
                text = ()


def distance(counts: Counter[tuple[int, ...]], temperature: float) -> float:
    """Total variation between what was drawn and the model's distribution given validity."""
    texts = [text for n in range(LONGEST + 1) for text in product(range(LETTERS), repeat=n) if valid(text)]
    own = {text: probability(text, temperature) for text in texts}
    total, count = sum(own.values()), sum(counts.values())
    assert set(counts) <= set(texts)
    return sum(abs(own[text] / total - counts[text] / count) for text in texts) / 2


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kept", [True, False], ids=["one tree", "a tree a text"])
def test_valid_texts_are_drawn_by_their_own_probability(temperature: float, kept: bool) -> None:
    """Each draw is exact, whatever was learnt before it."""
    rng = np.random.default_rng(3)
    attempts = Attempts(temperature)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(6000 if kept else 4000):
        counts[drawn(attempts if kept else Attempts(temperature), rng)] += 1
    assert distance(counts, temperature) < 0.03


def test_masks_alone_draw_from_another_distribution() -> None:
    """What the option is for; and that the test above can fail."""
    rng = np.random.default_rng(3)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(6000):
        text: tuple[int, ...] = ()
        while True:
            row_V, allowed_V = logits_of(text), allowed_after(text)
            if not allowed_V.any():
                text = ()
                continue
            token = int(np.where(allowed_V, row_V + rng.gumbel(size=row_V.size), -np.inf).argmax())
            if token == END:
                break
            text = (*text, token)
        counts[text] += 1
    assert distance(counts, 1.0) > 0.06


def test_bounds_only_fall_and_the_root_comes_to_the_probability_of_a_valid_text() -> None:
    rng = np.random.default_rng(5)
    attempts = Attempts(1.0)
    last = 1.0
    for _ in range(2000):
        drawn(attempts, rng)
        assert attempts.root.bound <= last + 1e-12
        last = attempts.root.bound
    texts = [text for n in range(LONGEST + 1) for text in product(range(LETTERS), repeat=n) if valid(text)]
    assert last == pytest.approx(sum(probability(text, 1.0) for text in texts), abs=1e-9)


def test_through_the_engine_frequencies_are_those_that_select_computes(tiny: Model) -> None:
    options = ["a", "ab", "ba"]
    exact = select(tiny, "abc", options).probabilities
    count = 150
    texts: Counter[str] = Counter()
    for seed in range(count):
        grammar = {"choices": options, "faithful": True}
        done = tiny.generate("abc", grammar=grammar, temperature=1.0, seed=seed, max_tokens=8)
        assert not isinstance(done, list) and done.completed and done.outcome is not None
        assert not any("own distribution" in warning for warning in done.outcome.warnings)
        texts[done.text] += 1
    shares = dict(zip(options, exact, strict=True)) if not isinstance(exact, dict) else exact
    total = sum(shares.values())
    for text in options:
        share = shares[text] / total
        assert abs(texts[text] / count - share) < 4 * (share * (1 - share) / count) ** 0.5 + 0.01, (texts, shares)


def test_the_same_seed_gives_the_same_text(tiny: Model) -> None:
    grammar = {"regex": "[ab]{1,2}", "faithful": True}
    first, second = (
        tiny.generate("abc", grammar=grammar, temperature=1.0, seed=4, max_tokens=6).token_ids for _ in range(2)
    )
    assert first == second


def test_it_gives_up_after_many_attempts_and_says_so(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faithful, "MOST_ATTEMPTS", 3)
    done = tiny.generate("abc", grammar={"regex": "[0-9]{9}", "faithful": True}, temperature=1.0, seed=1, max_tokens=12)
    assert not isinstance(done, list) and done.completed
    assert any("own distribution" in warning for warning in done.outcome.warnings)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}])
def test_what_would_not_be_faithful_is_refused(tiny: Model, sampling: dict[str, Any]) -> None:
    with pytest.raises(GrammarError, match="faithful"):
        tiny.generate("abc", grammar={"choices": ["a"], "faithful": True}, max_tokens=4, **sampling)
