"""The experiment that made the subject known: one prompt, many completions at temperature 0, one answer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import pytest

import gnomon
from helpers.feynman import PROMPT, count_answers, waves

TARGET = Path(__file__).parents[2] / "benchmarks" / "results" / "feynman.json"
COMPLETIONS, TOKENS = 1000, 64


@pytest.mark.model
@pytest.mark.timeout(900)
def test_64_completions_of_64_tokens_are_one_answer() -> None:
    with gnomon.load("smollm2-135m-instruct", profile="gguf") as model:
        alone = model.generate(model.render(PROMPT), max_tokens=64, temperature=0.0, ignore_eos=True)
        found = count_answers(model, completions=64, tokens=64)
        batch = model.stats().largest_batch
    assert list(found) == [tuple(alone.token_ids)]
    assert batch >= 8  # completions one by one would prove nothing


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("profile", ["gguf", "bf16"])
def test_1000_completions_are_one_answer(profile: str) -> None:
    """Accumulates under benchmarks/results/feynman.json: an interrupted run goes on where it stopped."""
    noted = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    with gnomon.load("smollm2-135m-instruct", profile=profile, ledger=False) as model:
        own = noted.get(profile, {})
        if own.get("fingerprint") != model.fingerprint or own.get("tokens") != TOKENS:
            own = {"fingerprint": model.fingerprint, "tokens": TOKENS, "waves": 0, "answers": {}}
        found: Counter[str] = Counter(own["answers"])
        for answers in waves(model, tokens=TOKENS, start=own["waves"]):
            if found.total() >= COMPLETIONS:
                break
            found.update(hashlib.sha256(json.dumps(answer).encode()).hexdigest()[:16] for answer in answers)
            own |= {"waves": own["waves"] + 1, "completions": found.total(), "answers": dict(found)}
            noted[profile] = own
            TARGET.write_text(json.dumps(noted, indent=2) + "\n")
    assert len(found) == 1
