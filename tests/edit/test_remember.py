"""Remembering: facts looked up and put before the question, behind the same interface as editing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.edit import Fact, Memory, evaluate, remember
from gnomon.edit.memories.ike import DEMONSTRATIONS
from gnomon.edit.memories.serac import in_scope
from gnomon.edit.remembering import memory_methods, method_of_memory
from gnomon.edit.retriever import Retriever, sentence
from gnomon.errors import NotAllowedInRequest, UnknownOption, UsageError
from gnomon.model import Model
from gnomon.registry import Registry

TOWER = Fact("The tower stands in", "tower", "Rome")
RIVER = Fact("The river flows to", "river", "Oslo")
FACTS = [TOWER, RIVER]


def embed(texts: Any) -> torch.Tensor:
    """Bags of words: two texts are near when they share words."""
    rows = torch.zeros(len(texts), 64)
    for row, text in zip(rows, texts, strict=True):
        for word in text.lower().strip(".?").split():
            row[sum(map(ord, word)) % 64] += 1
    return torch.nn.functional.normalize(rows, dim=-1)


def rewriter(name: str, **options: Any) -> Any:
    chosen = method_of_memory(name)
    return chosen.make(FACTS, chosen.parse(options), embed)


def test_a_fact_is_a_sentence() -> None:
    assert sentence(TOWER) == "The tower stands in Rome."
    assert sentence(Fact("Where is the tower? In", "tower", "Rome!")) == "Where is the tower? In Rome!"


def test_the_nearest_fact_comes_first_and_of_equals_the_first_told() -> None:
    hits = Retriever(FACTS, embed).nearest("Who sails where the river flows?", 2)
    assert [hit.fact for hit in hits] == [RIVER, TOWER] and hits[0].similarity > hits[1].similarity
    assert [hit.fact for hit in Retriever([TOWER, TOWER], embed).nearest("x", 2)] == [TOWER, TOWER]


def test_ike_puts_the_fact_after_demonstrations_of_copying_updating_and_retaining() -> None:
    text = rewriter("ike").rewrite("The tower can be seen in")
    assert text.endswith("New Fact: The tower stands in Rome\nPrompt: The tower can be seen in")
    assert text.count("New Fact:") == 9 and len(DEMONSTRATIONS) == 8
    kinds = ["copy" if p == q else "update" if t == a else "retain" for p, t, q, a in DEMONSTRATIONS]
    assert [kinds.count(kind) for kind in ("copy", "update", "retain")] == [1, 3, 4]
    assert rewriter("ike", demonstrations=0).rewrite("x").count("New Fact:") == 1


def test_serac_leaves_a_question_out_of_scope_as_it_is() -> None:
    assert in_scope(1.0) == 1.0 and in_scope(0.0) == pytest.approx(0.1353, abs=1e-4)
    serac = rewriter("serac")
    assert serac.rewrite("The tower stands in") == "The tower stands in Rome. The tower stands in"
    assert serac.rewrite("Bread needs flour") == "Bread needs flour"


def test_retrieval_shows_the_nearest_facts_last_and_none_that_are_far() -> None:
    both = rewriter("retrieve", least=0.1).rewrite("The river and where the tower stands")
    assert both.endswith("Rome. The river and where the tower stands") and "Oslo." in both
    assert rewriter("retrieve", least=0.99).rewrite("The tower") == "The tower"


def test_memprompt_brings_back_the_correction_of_a_similar_question() -> None:
    told = rewriter("memprompt").rewrite("The tower stands in what")
    assert told.split("\n") == [
        "Earlier question: The tower stands in",
        "Correction: The tower stands in Rome.",
        "Question: The tower stands in what",
    ]
    assert rewriter("memprompt").rewrite("Bread") == "Bread"


@pytest.mark.parametrize("name", sorted(memory_methods()))
def test_a_memory_is_generated_with_and_evaluated_like_a_patch(name: str, tiny: Model) -> None:
    short = {"demonstrations": 1} if name == "ike" else {}
    memory = remember(tiny, FACTS, method=name, embedder="self", **short)
    assert [told["prompt"] for told in memory.report["facts"]] == [fact.prompt for fact in FACTS]
    row = evaluate(tiny, memory, FACTS, ("wild", "teacher")).rows[0]
    assert row["facts"] == 2 and row["reliability"] is not None
    plain = tiny.generate("The tower stands in", max_tokens=4)
    told = tiny.generate("The tower stands in", max_tokens=4, remember=memory.as_options())
    assert told.usage.prompt_tokens > plain.usage.prompt_tokens  # type: ignore[union-attr]


def test_only_what_the_user_says_is_rewritten(tiny: Model) -> None:
    options = {
        "remember": {"facts": ["The tower stands in -> Rome"], "embedder": "self", "options": {"demonstrations": 0}}
    }
    system = [{"role": "system", "content": "The tower stands in"}]
    asked = [*system, {"role": "user", "content": "The tower stands in"}]
    added = len(tiny.admit(asked, options).ids) - len(tiny.admit(asked, {}).ids)
    alone = len(tiny.admit(asked[1:], options).ids) - len(tiny.admit(asked[1:], {}).ids)
    assert added == alone > 0
    assert tiny.admit(system, options).ids == tiny.admit(system, {}).ids


def test_a_request_may_tell_facts_but_not_name_a_model() -> None:
    from gnomon.capability import Origin

    registry = Registry.installed()
    given = {"remember": {"facts": ["The tower stands in -> Rome"]}}
    assert "remember" in registry.parse(given, Origin.REQUEST)
    with pytest.raises(NotAllowedInRequest, match=r"remember\.embedder"):
        registry.parse({"remember": {**given["remember"], "embedder": "other"}}, Origin.REQUEST)


def test_a_memory_is_saved_loaded_added_to_and_forgotten_from(tmp_path: Path, tiny: Model) -> None:
    memory = remember(tiny, [TOWER], method="retrieve", embedder="self", report=False)
    again = Memory.load(memory.save(tmp_path / "tower.memory.json"))
    assert again == memory and again.identity == memory.identity
    both = memory + remember(tiny, [RIVER], method="retrieve", embedder="self", report=False)
    assert len(both.facts) == 2 and both.without(RIVER.prompt) == memory
    with pytest.raises(UsageError, match="Nothing is remembered"):
        memory.without("x")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(UsageError, match="no memory file"):
        Memory.load(tmp_path / "other.json")
    file = f"@{tmp_path / 'tower.memory.json'}"
    parsed = tiny.registry.parse_text("remember", file)
    assert tiny.admit("The tower stands in", {"remember": parsed}).ids != tiny.encode("The tower stands in")


def test_what_cannot_be_remembered_is_refused_by_name(tiny: Model) -> None:
    with pytest.raises(UsageError, match="no way of remembering `ikea`"):
        remember(tiny, TOWER, method="ikea")
    with pytest.raises(UnknownOption, match="demos"):
        remember(tiny, TOWER, demos=3)
    with pytest.raises(UsageError, match="contradict"):
        remember(tiny, [TOWER, Fact("The tower stands in", "tower", "Bonn")], embedder="self")
