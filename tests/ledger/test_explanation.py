"""A run explained: made again with everything reported, token by token."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import gnomon
from gnomon.cli.main import run as command
from gnomon.ensemble import Ensemble
from gnomon.explanation import explain
from gnomon.loading import LEDGER
from gnomon.model import Model


@pytest.fixture
def model(tmp_path: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path / "home"))
    with gnomon.load(tiny_dir, threads=1, max_sequences=4, ledger=True) as opened:
        yield opened
        LEDGER.flush()


def test_greedy_tokens_are_favourites_and_the_probabilities_are_the_models_own(model: Model) -> None:
    done: Any = model.generate("hello", max_tokens=8, ignore_eos=True)
    told: Any = model.generate("hello", max_tokens=8, ignore_eos=True, logprobs=5)
    (found,) = explain(LEDGER.find(done.id), model)
    assert found.replay.ok and found.generation is not None and found.generation.text == done.text
    assert [step.token_id for step in found.steps] == done.token_ids
    assert {step.why for step in found.steps} == {"favourite"}
    assert [step.probability for step in found.steps] == [math.exp(token.logprob) for token in told.logprobs]


def test_a_token_that_is_no_favourite_says_why(model: Model) -> None:
    free: Any = model.generate("hello", max_tokens=4, ignore_eos=True)
    hot: Any = model.generate("hello", max_tokens=20, temperature=2.0, seed=3, ignore_eos=True)
    biased: Any = model.generate("hello", max_tokens=4, logit_bias={free.token_ids[0]: -100.0}, ignore_eos=True)
    drawn = explain(LEDGER.find(hot.id), model)[0].steps
    assert "drawn" in {step.why for step in drawn}
    assert all((step.favourite is None) == (step.why == "favourite") for step in drawn)
    first = explain(LEDGER.find(biased.id), model)[0].steps[0]
    assert first.why == "shifted" and first.favourite is not None and first.favourite[1] > first.probability


def test_a_grammar_is_seen_in_what_it_left(model: Model) -> None:
    done: Any = model.generate("hello", max_tokens=12, grammar={"choices": ["abc", "abd"]})
    (found,) = explain(LEDGER.find(done.id), model)
    assert done.text in ("abc", "abd") and "".join(step.text for step in found.steps) == done.text
    assert {"forced", "masked"} & {step.why for step in found.steps}
    assert all(step.kept_mass is not None and 0 <= step.kept_mass <= 1 for step in found.steps)


def test_what_a_guard_hid_stays_hidden(model: Model) -> None:
    free: Any = model.generate("hello", max_tokens=12, ignore_eos=True)
    assert free.text
    word = next(c for c in free.text if c.isascii() and c.isalnum())
    rule = {"use": "regex", "name": "letter", "regex": word, "action": "redact"}
    done: Any = model.generate("hello", max_tokens=12, ignore_eos=True, guard={"output": [rule]})
    (found,) = explain(LEDGER.find(done.id), model)
    assert done.findings and found.generation is not None
    assert found.generation.text == done.text and found.generation.findings == done.findings
    assert len(found.steps) == len(done.token_ids) and all(word not in step.text for step in found.steps)


def test_an_ensembles_votes_are_told(model: Model, tiny_dir: Path) -> None:
    with Ensemble([str(tiny_dir), str(tiny_dir)], core="union", threads=1, max_sequences=2, ledger=True) as both:
        done: Any = both.generate("hello", max_tokens=3, ignore_eos=True)
        (found,) = explain(LEDGER.find(done.id), both)
    assert found.replay.ok and len(found.steps) == 3
    assert all(step.runner is not None and len(step.runner["ensemble"]["votes"]) == 2 for step in found.steps)


def test_the_command_shows_it_and_gives_json(model: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    done: Any = model.generate("hello", max_tokens=3, ignore_eos=True)
    LEDGER.flush()
    assert command(["explain", done.id]) == 0
    shown = capsys.readouterr().out
    assert "identical bit for bit" in shown and len(shown.splitlines()) == 1 + 3 + 1
    assert command(["explain", done.id, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["verdict"] == "identical" and len(told["steps"]) == 3
    assert command(["explain", "nothing"]) == 2
