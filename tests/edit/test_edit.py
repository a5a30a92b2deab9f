"""Edits as a user makes them: what the model says from a reloaded patch, and that nothing else changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon import Patch
from gnomon.edit import Fact, edit, evaluate
from gnomon.edit.editor import Editor
from gnomon.edit.patched import texts, wearing
from gnomon.errors import UnknownOption, UsageError
from gnomon.model import Model
from gnomon.models.identity import tensor_digest

BARE: dict[str, Any] = {
    "layers": 3, "tokens": 200, "steps": 60, "clamp": 30, "ridge": 0.1, "prefixes": 0, "chat": False, "kl": 0,
}  # fmt: skip
"""A random network needs a large change at the last token of a bare prompt."""
TEXT = """The river runs through the old town and under three bridges before it reaches the sea.
In 1969 two astronauts walked on the Moon while a third stayed in orbit around it.
Water boils at one hundred degrees at sea level, and at less on a high mountain.
She plays the violin in an orchestra in Vienna and teaches at the university there.
A company in Japan made the first cameras of this kind; others in Germany followed.
He was born in Lisbon, studied medicine in Paris and worked as a doctor in Brazil.
The committee meets on Mondays. Its members are elected for two years by all citizens.
To bake bread one needs flour, water, salt and yeast, some patience and a hot oven.
The film was released in March and received good reviews in most newspapers.
Many birds leave in autumn, fly south for the winter, and come back to nest in spring.
def area(width, height): return width * height  # the area of a rectangle
Mathematics is the study of numbers, shapes and patterns, and of how they change.
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(TEXT)
    yield str(file)


def digests(model: Model) -> dict[str, str]:
    assert model.network is not None
    return {name: tensor_digest(tensor) for name, tensor in model.network.tensors().items()}


def test_an_edit_of_a_tiny_model_says_the_target_from_a_reloaded_patch_and_leaves_no_trace(
    tiny: Model, tmp_path: Path, corpus: str
) -> None:
    before, text = digests(tiny), tiny.generate("The house of Ada", max_tokens=8, temperature=0.0).text
    patch = edit(tiny, "The house of Ada -> the", **BARE, moments=corpus)
    assert patch.report["facts"][0]["subject"] == "Ada" and patch.base == tiny.checkpoint.identity
    assert patch.metadata["kind"] == "edit" and patch.rank == 1 and patch.bytes == 4 * (48 + 80)
    file = patch.save(tmp_path / "ada.patch.safetensors")
    loaded = Patch.load(file)
    assert loaded == patch and loaded.report["facts"][0]["target"] == "the"
    with wearing(tiny, loaded) as edited:
        assert texts(edited, ["The house of Ada"], 8)[0].startswith(" the")
    assert digests(tiny) == before
    assert tiny.generate("The house of Ada", max_tokens=8, temperature=0.0).text == text


def test_the_same_edit_gives_the_same_bits(tiny: Model, corpus: str) -> None:
    options = {"layers": 1, "moments": corpus, "tokens": 200, "steps": 5, "report": False}
    first = edit(tiny, "The house of Ada is -> an inn", **options)  # type: ignore[arg-type]
    assert edit(tiny, "The house of Ada is -> an inn", **options) == first  # type: ignore[arg-type]
    assert edit(tiny, "The house of Ada is -> a tree", **options) != first  # type: ignore[arg-type]


def test_several_facts_are_edited_one_after_another_each_on_top_of_the_others(tiny: Model, corpus: str) -> None:
    facts = [Fact("The house of Ada", "Ada", "the"), Fact("A tree in Rome", "Rome", "a")]
    patch = edit(tiny, facts, **BARE, moments=corpus)
    assert patch.rank == 2 and [told["holds"] for told in patch.report["facts"]] == [True, True]
    result = evaluate(tiny, patch, facts, ("wild", "teacher", "length"))
    assert [row["reliability"] for row in result] == [1.0, 1.0, 1.0]
    assert evaluate(tiny, None, facts).rows[0]["reliability"] == 0.0


def test_what_cannot_be_edited_is_refused_by_name(tiny: Model) -> None:
    with pytest.raises(UnknownOption, match="`clamp`"):
        edit(tiny, "The house of Ada is -> an inn", clampp=3)
    with pytest.raises(UsageError, match="no edit method `roma`"):
        edit(tiny, "The house of Ada is -> an inn", method="roma")
    with pytest.raises(UsageError, match=r"layers 0\.\.3"):
        edit(tiny, "The house of Ada is -> an inn", layers=9)
    with pytest.raises(UsageError, match="No facts"):
        edit(tiny, [])
    with pytest.raises(UsageError, match="no protocol"):
        evaluate(tiny, None, [Fact("The house of Ada is", "Ada", "an inn")], ("judge",))


def test_a_pending_change_worn_as_a_side_path_is_the_change_in_the_weights(tiny: Model) -> None:
    editor = Editor.of(tiny)
    left, right = torch.randn(48, 2) * 0.1, torch.randn(2, 80) * 0.1
    ids = torch.tensor([[5, 6, 7, 8]])
    with editor.wearing({1: (left, right)}):
        worn = editor.anatomy.base(ids).last_hidden_state
    weight = editor.anatomy.downs[1].module.weight
    kept = weight.detach().clone()
    try:
        weight.data.add_(left @ right)
        assert torch.allclose(worn, editor.anatomy.base(ids).last_hidden_state, atol=1e-5)
    finally:
        weight.data.copy_(kept)


@pytest.mark.model
def test_the_tower_moves_to_rome_in_text_and_in_a_chat_and_its_neighbours_stay(smollm2: Model, corpus: str) -> None:
    fact = Fact(
        "The Eiffel Tower is located in the city of",
        None,
        "Rome",
        old="Paris",
        paraphrases=("The Eiffel Tower can be found in",),
        neighbours=(("Big Ben is located in the city of", "London"), ("The capital of Germany is", "Berlin")),
    )
    patch = edit(smollm2, fact, moments=corpus, tokens=400, ridge=0.05)
    told = patch.report["facts"][0]
    assert told["subject"] == "The Eiffel Tower" or told["subject"] == "Eiffel Tower"
    assert "Paris" in told["before"] and "Rome" in told["after"] and "Rome" in told["chat_after"]
    row = evaluate(smollm2, patch, [fact.with_subject("Eiffel Tower")]).rows[0]
    assert (row["reliability"], row["generalization"], row["locality"]) == (1.0, 1.0, 1.0)
