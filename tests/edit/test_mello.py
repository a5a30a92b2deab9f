"""MeLLo's course, with a model whose lines are written here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gnomon.edit import Fact
from gnomon.edit.mello import AGREES, CONTRADICTS, EXAMPLE, answer, asking
from gnomon.errors import UsageError
from gnomon.model import Model

FACTS = [Fact("The tower stands in", "tower", "Rome"), Fact("The river flows to", "river", "Oslo")]
QUESTION = "Which language is spoken where the tower stands?"


def embed(texts: Any) -> torch.Tensor:
    rows = torch.tensor([[float("tower" in t), float("river" in t), 0.1] for t in texts])
    return torch.nn.functional.normalize(rows, dim=-1)


class Script:
    """Answers with the next line; keeps what it was asked."""

    def __init__(self, *lines: str) -> None:
        self.lines, self.seen = list(lines), [""]

    def __call__(self, prompt: str, stop: str) -> str:
        assert stop == "\n" and prompt.startswith(EXAMPLE)
        self.seen.append(prompt.removeprefix(EXAMPLE))
        return self.lines.pop(0)


def test_a_fact_that_contradicts_wins_and_the_next_hop_goes_on_from_it() -> None:
    script = Script(
        "Subquestion: Where does the tower stand?", " Paris", f" {CONTRADICTS}",
        "Subquestion: Which language is spoken in Rome?", " Italian", f" {AGREES}", "Final answer: Italian",
    )  # fmt: skip
    found = answer(script, FACTS, embed, QUESTION)
    assert found.text == "Italian"
    assert [(hop.tentative, hop.contradicts, hop.answer) for hop in found.hops] == [
        ("Paris", True, "Rome"),
        ("Italian", False, "Italian"),
    ]
    assert found.hops[0].fact == FACTS[0]
    assert script.seen[-1].splitlines() == [
        f"Question: {QUESTION}",
        "Subquestion: Where does the tower stand?",
        "Tentative answer: Paris",
        "Known fact: The tower stands in Rome.",
        f"The fact {CONTRADICTS}",
        "So: Rome",
        "Subquestion: Which language is spoken in Rome?",
        "Tentative answer: Italian",
        "Known fact: The tower stands in Rome.",
        f"The fact {AGREES}",
        "So: Italian",
    ]


def test_a_model_that_does_not_follow_the_form_gives_no_answer() -> None:
    assert answer(Script("I do not know."), FACTS, embed, QUESTION).text is None


def test_hops_are_bounded() -> None:
    endless = ["Subquestion: Where is the river?", " x", f" {AGREES}"]
    found = answer(Script(*endless * 2, endless[0]), FACTS, embed, QUESTION, hops=2)
    assert found.text is None and len(found.hops) == 2


def test_a_real_model_can_be_asked_line_by_line(tiny: Model) -> None:
    line = asking(tiny, tokens=4)("The house of Ada", "\n")
    assert "\n" not in line and line == tiny.generate("The house of Ada", max_tokens=4, stop=["\n"]).text  # type: ignore[union-attr]


def test_without_facts_there_is_nothing_to_do() -> None:
    with pytest.raises(UsageError, match="needs facts"):
        answer(Script(), [], embed, QUESTION)
