"""Causal tracing restores what noise destroyed; attention knockout blinds; edits are joined unless they contradict."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gnomon.edit import Fact, Memory, edit
from gnomon.edit.editor import Editor
from gnomon.edit.joined import join_edits
from gnomon.edit.trace import KINDS, Trace, trace
from gnomon.edit.trace_page import page
from gnomon.errors import UsageError
from gnomon.model import Model

PROMPT, SUBJECT = "The house of Ada is in", "Ada"


@pytest.fixture(scope="module")
def found(tiny: Model) -> Trace:
    return trace(Editor.of(tiny), PROMPT, SUBJECT, samples=2, window=2)


def test_the_clean_probability_is_the_models_own(found: Trace, tiny: Model) -> None:
    probabilities = torch.softmax(tiny.logits(PROMPT)[-1], -1)
    assert found.clean == pytest.approx(float(probabilities.max()), rel=1e-4)
    assert found.answer == tiny.tokenizer.decode([int(probabilities.argmax())], skip_special_tokens=False)


def test_every_layer_and_token_has_an_effect_of_every_kind(found: Trace, tiny: Model) -> None:
    layers, tokens = len(Editor.of(tiny).anatomy.layers), len(tiny.encode(PROMPT))
    assert set(found.effects) == set(KINDS)
    assert all(len(grid) == layers and all(len(row) == tokens for row in grid) for grid in found.effects.values())
    assert "".join(found.tokens).replace("Ġ", " ").strip().endswith("in")


def test_restoring_the_last_state_of_the_last_token_brings_the_answer_back_whole(found: Trace) -> None:
    assert found.effects["state"][-1][-1] == pytest.approx(found.clean, rel=1e-4)


def test_what_stands_before_the_subject_was_never_disturbed(found: Trace) -> None:
    for grid in found.effects.values():
        for row in grid:
            assert row[0] == pytest.approx(found.corrupted, rel=1e-4)


def test_without_noise_nothing_is_lost_and_nothing_restored(tiny: Model) -> None:
    still = trace(Editor.of(tiny), PROMPT, SUBJECT, samples=1, noise=0.0)
    assert still.corrupted == pytest.approx(still.clean, rel=1e-5)
    assert all(v == pytest.approx(still.clean, rel=1e-4) for g in still.effects.values() for row in g for v in row)


def test_knocking_out_all_layers_is_as_if_the_tokens_were_not_seen_by_the_last_one(tiny: Model) -> None:
    """With a window over everything, every layer's number is the same, and another than the clean one."""
    wide = trace(Editor.of(tiny), PROMPT, SUBJECT, samples=1, window=100)
    row = wide.knockout["subject"]
    assert row[0] == pytest.approx(row[-1], rel=1e-5) and abs(row[0] - wide.clean) > 1e-9
    assert set(wide.knockout) <= {"subject", "before", "after"}


def test_the_model_says_the_same_after_a_trace(found: Trace, tiny: Model) -> None:
    again = trace(Editor.of(tiny), PROMPT, SUBJECT, samples=2, window=2)
    assert again == found


def test_a_given_answer_is_followed(tiny: Model) -> None:
    other = trace(Editor.of(tiny), PROMPT, SUBJECT, answer="the", samples=1)
    wanted = tiny.tokenizer.encode(" the", add_special_tokens=False)[0]
    assert other.clean == pytest.approx(float(torch.softmax(tiny.logits(PROMPT)[-1], -1)[wanted]), rel=1e-4)


def test_the_page_stands_alone_and_escapes_what_it_shows(found: Trace) -> None:
    text = page(Trace(**{**found.as_dict(), "prompt": "<script>"}))
    assert "<script>" not in text and "http" not in text and text.count("<svg") == 4
    assert text.count("<rect") == 3 * len(found.tokens) * len(found.effects["mlp"])


def test_a_subject_that_is_not_there_is_refused(tiny: Model) -> None:
    with pytest.raises(UsageError, match="must stand once"):
        trace(Editor.of(tiny), PROMPT, "Bob")


def test_edits_are_joined_and_contradictions_refused_by_name(tiny: Model, tmp_path: Path) -> None:
    options = {"moments": "identity", "layers": 2, "steps": 2, "report": False, "contrast": 0}
    house = edit(tiny, Fact("The house of Ada", "Ada", "the"), **options)  # type: ignore[arg-type]
    tree = edit(tiny, Fact("A tree in Rome", "Rome", "a"), **options)  # type: ignore[arg-type]
    other = edit(tiny, Fact("The house of Ada", "Ada", "inn"), **options)  # type: ignore[arg-type]
    both = join_edits([house, tree])
    assert both == house + tree and len(both.metadata["facts"]) == 2  # type: ignore[union-attr, operator]
    with pytest.raises(UsageError, match="`The house of Ada` -> `the` and -> `inn`"):
        join_edits([house, tree, other])
    assert join_edits([house, tree, other], latest=True) == tree + other
    with pytest.raises(UsageError, match="cannot become one file"):
        join_edits([house, Memory((Fact("A b", "b", "c"),))])
