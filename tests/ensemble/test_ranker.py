"""The pair ranker learns what its pairs say, and only works with the embeddings it learned on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from gnomon.ensemble.answers import best_of
from gnomon.ensemble.ranker import PairRanker, Preference, fit_weights
from gnomon.errors import UsageError
from gnomon.model import Model


def letters(identity: str = "letters") -> Any:
    """Embeds a text as its letters' counts, at unit length."""

    def embed(texts: list[str]) -> torch.Tensor:
        rows = [[text.count(chr(97 + place)) for place in range(26)] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32) + 0.01, dim=-1)

    return SimpleNamespace(embed=embed, name=identity, checkpoint=SimpleNamespace(identity=identity))


PAIRS = [Preference("pick", f"{word}a", f"{word}z") for word in ("b", "cc", "def", "ghi", "no")]


def test_what_was_preferred_is_preferred_again_and_odds_are_consistent() -> None:
    ranker = PairRanker.fit(letters(), PAIRS, penalty=0.1)
    assert ranker.best("pick", ["mz", "ma", "m"]) == 1
    assert ranker.prefers("pick", "qa", "qz") > 0.6
    assert ranker.prefers("pick", "qa", "qz") + ranker.prefers("pick", "qz", "qa") == pytest.approx(1)
    other = PairRanker.fit(letters(), [Preference(p.prompt, p.worse, p.better) for p in PAIRS], penalty=0.1)
    assert other.best("pick", ["mz", "ma", "m"]) == 0  # the mutation check: turned pairs turn the order


def test_the_fit_is_where_the_gradient_vanishes_and_the_same_each_time() -> None:
    rows = np.random.default_rng(0).normal(size=(40, 6))
    weights = fit_weights(rows, 0.5)
    right = 1 / (1 + np.exp(-(rows @ weights)))
    assert np.abs(rows.T @ (1 - right) - 0.5 * weights).max() < 1e-8
    assert np.array_equal(weights, fit_weights(rows, 0.5))


def test_a_ranker_is_kept_with_the_embeddings_it_belongs_to(tmp_path: Path) -> None:
    ranker = PairRanker.fit(letters(), PAIRS)
    ranker.save(tmp_path / "r.json")
    again = PairRanker.load(tmp_path / "r.json", letters())
    assert again.scores("pick", ["xa", "xz"]) == ranker.scores("pick", ["xa", "xz"])
    with pytest.raises(UsageError, match="another embedding model"):
        PairRanker.load(tmp_path / "r.json", letters("others"))
    (tmp_path / "bad.json").write_text(json.dumps({"weights": 3}))
    with pytest.raises(UsageError, match="is no ranker"):
        PairRanker.load(tmp_path / "bad.json", letters())
    with pytest.raises(UsageError, match="learns from pairs"):
        PairRanker.fit(letters(), [])


def test_best_of_asks_the_ranker(tiny: Model, duo: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [tiny, duo.models[1]]  # type: ignore[attr-defined]
    asked = {"n": 2, "max_tokens": 4, "temperature": 0.9, "seed": 1, "ignore_eos": True}
    ranker = PairRanker.fit(letters(), PAIRS)
    seen: list[str] = []

    def last(self: Any, prompt: str, answers: list[str]) -> int:
        seen.extend(answers)
        return len(answers) - 1

    monkeypatch.setattr(PairRanker, "best", last)
    assert best_of(models, "the band", ranker=ranker, **asked).text == seen[-1]
