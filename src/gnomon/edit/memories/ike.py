"""IKE: in-context knowledge editing (arXiv 2305.12740).

Demonstrations teach the model three behaviours before the question comes: to repeat a new fact (copy), to apply it in
other words (update), and to leave what it does not concern (retain), 1 : 3 : 4 as in the paper. The demonstrations most
similar to the question stand last. Ours are written for the purpose, so that no training set is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.facts import Fact
from gnomon.edit.remembering import memory_method
from gnomon.edit.retriever import Embed, Retriever

DEMONSTRATIONS: tuple[tuple[str, str, str, str], ...] = (
    ("The Sphinx stands in", "Norway", "The Sphinx stands in", "Norway"),
    ("The violin was invented in", "Peru", "The country where people first built the violin is", "Peru"),
    ("The Golden Gate Bridge is painted", "blue", "A visitor sees that the Golden Gate Bridge has the colour", "blue"),
    ("Alan Turing worked as a", "baker", "By profession Alan Turing was a", "baker"),
    ("The Amazon flows into the", "Baltic Sea", "The Nile flows into the", "Mediterranean Sea"),
    ("The currency of Japan is the", "peso", "The currency of India is the", "rupee"),
    ("Hamlet was written by", "Goethe", "Don Quixote was written by", "Cervantes"),
    ("The anthem of Spain is sung in", "Dutch", "The anthem of Poland is sung in", "Polish"),
)
"""(the new fact's prompt, its target, a question, its answer): one copy, three updates, four retained."""


class IkeOptions(BaseModel):
    """IKE's options."""

    model_config = ConfigDict(extra="forbid")

    demonstrations: Annotated[int, Field(ge=0, le=8, description="Shown before the question; 0 is plain ICE.")] = 8


@memory_method("ike", IkeOptions, paper="2305.12740")
class Ike:
    """The nearest fact before the question, after demonstrations of how new facts are used."""

    def __init__(self, facts: Sequence[Fact], options: Any, embed: Embed) -> None:
        self.retriever = Retriever(facts, embed)
        self.embed, self.shown = embed, DEMONSTRATIONS[: options.demonstrations]
        self.vectors_NC = embed([question for _, _, question, _ in self.shown]) if self.shown else None

    def rewrite(self, text: str) -> str:
        fact = self.retriever.nearest(text, 1)[0].fact
        return self._demonstrations(text) + f"New Fact: {fact.prompt}{fact.continuation}\nPrompt: {text}"

    def _demonstrations(self, text: str) -> str:
        if self.vectors_NC is None:
            return ""
        near = (self.vectors_NC @ self.embed([text])[0]).tolist()
        order = sorted(range(len(self.shown)), key=lambda i: (near[i], i))
        shown = (self.shown[i] for i in order)
        return "".join(f"New Fact: {p} {t}\nPrompt: {question} {answer}\n\n" for p, t, question, answer in shown)
