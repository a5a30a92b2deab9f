"""Probabilities of texts over every way to spell them, against sums made another way."""

from __future__ import annotations

import itertools
import math

import pytest

from gnomon.errors import GrammarError
from gnomon.grammar import select
from gnomon.grammar.selecting import Spelling, _Summing
from gnomon.model import Model

PROMPT = "the quick"


def brute_force(model: Model, wanted: bytes) -> float:
    """All token sequences up to the text's length whose bytes begin with it, and no shorter beginning of which does."""
    tokenizer = model.tokenizer
    control = tokenizer.special_ids | tokenizer.eos_token_ids
    spelled = {i: tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size) if i not in control}
    spelled = {i: text for i, text in spelled.items() if text}
    useful = [i for i, text in spelled.items() if text in wanted or any(text.startswith(wanted[k:]) for k in range(9))]
    ids, total = model.encode(PROMPT), []
    for length in range(1, len(wanted) + 1):
        for tokens in itertools.product(useful, repeat=length):
            before = b"".join(spelled[token] for token in tokens[:-1])
            if before.startswith(wanted) or not wanted.startswith(before):
                continue
            if not (before + spelled[tokens[-1]]).startswith(wanted):
                continue
            rows = model.logits([*ids, *tokens]).double().softmax(-1)[len(ids) - 1 :]
            total.append(math.prod(float(rows[place][token]) for place, token in enumerate(tokens)))
    return math.fsum(total)


@pytest.mark.parametrize("text", ["t", "th", " f"])
def test_the_sum_over_all_spellings_is_that_of_brute_force(tiny: Model, text: str) -> None:
    summing = _Summing(tiny, list(tiny.encode(PROMPT)), 0.0)
    found, unseen = summing.text(text.encode(), ended=False)
    assert found == pytest.approx(brute_force(tiny, text.encode()), rel=1e-6)
    assert unseen == 0


def test_the_first_bytes_of_all_texts_and_the_control_tokens_sum_to_one(tiny: Model) -> None:
    summing = _Summing(tiny, list(tiny.encode(PROMPT)), 0.0)
    mass = math.fsum(summing.text(bytes([byte]), ended=False)[0] for byte in range(256))
    row = summing._row((), b"")
    spelled = {token for _, token in Spelling(tiny.tokenizer).sorted}
    rest = math.fsum(float(row[token]) for token in range(len(row)) if token not in spelled)
    assert mass + rest == pytest.approx(1.0, abs=1e-9)


def test_left_out_spellings_are_bounded_by_what_is_reported(tiny: Model) -> None:
    exact, _ = _Summing(tiny, list(tiny.encode(PROMPT)), 0.0).text(b"the", ended=True)
    found, unseen = _Summing(tiny, list(tiny.encode(PROMPT)), 1e-6).text(b"the", ended=True)
    assert found <= exact <= found + unseen


def test_the_best_option_is_named_and_probabilities_sum_to_one(tiny: Model) -> None:
    found = select(tiny, PROMPT, ["th", "the", "x"], least=0.0)
    assert sum(found.probabilities.values()) == pytest.approx(1.0)
    assert found.text == max(found.mass, key=lambda option: found.mass[option]) == str(found)


def test_an_option_that_begins_another_needs_a_word_about_what_follows(tiny: Model) -> None:
    with pytest.raises(GrammarError, match="is the beginning of"):
        select(tiny, PROMPT, ["yes", "yes, sir"], until="")
    assert set(select(tiny, PROMPT, ["y", "ys"], until=".", least=0.0).mass) == {"y", "ys"}


@pytest.mark.parametrize("options", [[], ["a", "a"], [""], "ab"])
def test_what_is_no_choice_is_refused(tiny: Model, options: list[str]) -> None:
    with pytest.raises(GrammarError):
        select(tiny, PROMPT, options)


@pytest.mark.model
def test_the_real_model_knows_that_paris_is_the_capital_of_france(smollm2: Model) -> None:
    found = select(smollm2, "The capital of France is", [" Paris", " London", " Rome"], until="")
    assert found.text == " Paris" and found.probabilities[" Paris"] > 0.9
    assert max(found.unseen.values()) < 1e-4
