"""Retriever: which remembered facts a text is about, by cosine of sentence embeddings.

embed: texts -> [n, C], L2-normalised. A fact is embedded as the sentence it makes. Knows nothing of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from gnomon.edit.facts import Fact

Embed = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Hit:
    """One fact and how near it is, -1..1."""

    fact: Fact
    similarity: float


class Retriever:
    """Holds the facts' vectors; made once per memory."""

    def __init__(self, facts: Sequence[Fact], embed: Embed) -> None:
        self.facts, self.embed = tuple(facts), embed
        self.vectors_NC = embed([sentence(fact) for fact in facts])

    def nearest(self, text: str, count: int) -> list[Hit]:
        """The nearest facts, best first; of equals, the one that was told first."""
        scores = (self.vectors_NC @ self.embed([text])[0]).tolist()
        order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return [Hit(self.facts[i], scores[i]) for i in order[:count]]


def sentence(fact: Fact) -> str:
    """The fact as one sentence: "The capital of France is Lyon."."""
    text = (fact.prompt + fact.continuation).strip()
    return text if text[-1] in ".!?。！？" else text + "."
