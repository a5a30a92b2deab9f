"""Measures beside the protocols, on self-written records and a model whose answers are known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from gnomon.edit import Fact, Probe, measures
from gnomon.edit.formats import fact_of, facts_of
from gnomon.edit.measures import consistency, measure
from gnomon.edit.plot import draw
from gnomon.edit.table import table
from gnomon.errors import UsageError
from gnomon.model import Model

ANSWERS = {
    "The mother of Ada is": "Eve.",
    "Ada's mum is": "Eve",
    "The grandmother of Ada is": "Lea",
    "The father of Ada is": "Bob",
    "The uncle of Ada is": "nobody",
    "The mother of Eve is": "Lea",
    "Who wrote it?": "Ann",
    "Where was its author born?": "Rome",
    "In which town was the writer born?": "Paris",
    "Where was Ann born?": "Rome",
    "It was written by": "Ann",
}


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> Model:
    """A model that says what ANSWERS says."""
    monkeypatch.setattr(measures, "texts", lambda model, prompts, tokens: [f" {ANSWERS[p]}" for p in prompts])
    return SimpleNamespace()  # type: ignore[return-value]


def query(prompt: str, *answers: str) -> dict[str, Any]:
    return {"prompt": prompt, "answers": [{"value": answer, "aliases": []} for answer in answers]}


RIPPLE = {
    "example_type": "random",
    "edit": {
        "prompt": "The mother of Ada is Eve.",
        "original_fact": {"prompt": "The mother of Ada is Ann."},
    },
    "Subject_Aliasing": [{"test_queries": [query("Ada's mum is", "Eve")], "test_condition": "OR"}],
    "Compositionality_I": [
        {
            "test_queries": [query("The grandmother of Ada is", "Lea"), query("The uncle of Ada is", "Tom")],
            "test_condition": "OR",
            "condition_queries": [query("The mother of Eve is", "Lea")],
        },
        {
            "test_queries": [query("The grandmother of Ada is", "Lea"), query("The uncle of Ada is", "Tom")],
            "test_condition": "AND",
        },
        {
            "test_queries": [query("The grandmother of Ada is", "Lea")],
            "test_condition": "AND",
            "condition_queries": [query("The mother of Eve is", "Somebody else")],
        },
    ],
    "Relation_Specifity": [{"test_queries": [query("The father of Ada is", "Bob")], "test_condition": "AND"}],
}

MQUAKE = {
    "case_id": 7,
    "requested_rewrite": [
        {"prompt": "{} was written by", "subject": "It", "target_new": {"str": "Ann"}, "target_true": {"str": "Tom"}},
    ],
    "questions": ["Where was its author born?", "In which town was the writer born?"],
    "new_answer": "Rome",
    "new_answer_alias": [],
    "new_single_hops": [
        {"question": "Who wrote it?", "answer": "Ann", "answer_alias": []},
        {"question": "Where was Ann born?", "answer": "Rome", "answer_alias": []},
    ],
}


def test_a_ripple_test_counts_where_its_conditions_hold_and_joins_queries_as_its_record_says(
    oracle: Model,
) -> None:
    found = measure("criteria", oracle, None, [fact_of(RIPPLE)])
    assert [dict(row) for row in found] == [
        {"criterion": "Compositionality_I", "tests": 2, "left_out": 1, "passed": 0.5},
        {"criterion": "Subject_Aliasing", "tests": 1, "left_out": 0, "passed": 1.0},
        {"criterion": "Relation_Specificity", "tests": 1, "left_out": 0, "passed": 1.0},
    ]


def test_mquake_counts_a_case_when_any_of_its_questions_is_right_and_all_its_hops(oracle: Model) -> None:
    row = measure("multi-hop", oracle, None, facts_of(MQUAKE)).rows[0]
    assert row == {"cases": 1, "edit_wise": 1.0, "instance_wise": 1.0, "multi_hop": 1.0}
    wrong = {**MQUAKE, "new_answer": "Oslo", "new_single_hops": [{"question": "Who wrote it?", "answer": "Tom"}]}
    row = measure("multi-hop", oracle, None, facts_of(wrong)).rows[0]
    assert row == {"cases": 1, "edit_wise": 1.0, "instance_wise": 0.0, "multi_hop": 0.0}


def test_magnitudes_are_differences_of_the_models_probabilities(tiny: Model) -> None:
    fact = Fact("The house of Ada", "Ada", "and", old="inn", paraphrases=["A house"], neighbours=[("The inn", "in")])
    row = measure("magnitude", tiny, None, [fact]).rows[0]

    def probability(prompt: str, answer: str) -> float:
        return math.exp(tiny.score(prompt, " " + answer).logprob / len(tiny.score(prompt, " " + answer).tokens))

    assert row["EM"] == pytest.approx(probability(fact.prompt, "and") - probability(fact.prompt, "inn"), abs=1e-6)
    assert row["NM"] == pytest.approx(probability("The inn", "in") - probability("The inn", "and"), abs=1e-6)


def test_an_unchanged_model_diverges_by_nothing_and_a_changed_one_by_something(tiny: Model) -> None:
    from gnomon.edit import edit

    fact = Fact("The house of Ada", "Ada", "the", neighbours=[("The house of Bob", "in")])
    assert measure("plus", tiny, None, [fact]).rows[0]["NKL_1e-6"] == 0.0
    patch = edit(tiny, fact, layers=2, moments="identity", steps=4, report=False, contrast=0)
    row = measure("plus", tiny, patch, [fact]).rows[0]
    assert row["NKL_1e-6"] > 0 and row["NS+"] in (0.0, 1.0)


def test_writing_is_the_entropy_of_the_models_own_text(tiny: Model) -> None:
    from gnomon.edit.protocols import ngram_entropy

    fact = Fact("The house of Ada", "Ada", "the", references=["the house and the garden"])
    row = measure("writing", tiny, None, [fact]).rows[0]
    said = tiny.generate(fact.prompt, max_tokens=100, temperature=0.0).text  # type: ignore[union-attr]
    assert row["fluency"] == row["fluency_before"] == pytest.approx(ngram_entropy(fact.prompt + said))
    assert row["consistency"] == pytest.approx(consistency(said, fact.references))


def test_consistency_is_one_for_the_same_words_and_zero_for_none() -> None:
    assert consistency("A red house", ["the red house"]) == pytest.approx(1.0)
    assert consistency("red", ["blue"]) == 0.0 == consistency("", ["x"])
    assert 0 < consistency("red house", ["red garden", "x"]) < 1


def test_a_measure_that_is_none_is_refused(tiny: Model) -> None:
    with pytest.raises(UsageError, match="no measure `x`"):
        measure("x", tiny, None, [])


def test_a_comparison_is_drawn_with_a_bar_per_method_and_metric() -> None:
    rows = [
        {"method": "<rome>", "protocol": "wild", "reliability": 1.0, "reliability_ci": 0.1, "locality": 0.5},
        {"method": "ike", "protocol": "wild", "reliability": 0.25, "locality": None},
    ]
    picture = draw(table(rows))
    assert "&lt;rome&gt;" in picture and "<rome>" not in picture
    assert picture.count("<rect") == 1 + 2 + 3 and picture == draw(table(rows))
    assert 'height="200.0"' in picture and 'height="50.0"' in picture


def test_a_probe_says_what_it_stands_on() -> None:
    probes = fact_of(RIPPLE).probes()
    first = next(probe for probe in probes if probe.group == "Compositionality_I")
    assert first == Probe(
        "The grandmother of Ada is", ("Lea",), "Compositionality_I", (("The mother of Eve is", ("Lea",)),), 1, True
    )
