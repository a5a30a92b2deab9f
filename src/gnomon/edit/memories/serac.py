"""SERAC: a memory behind a scope classifier (arXiv 2206.06520), in its simplest form.

A question whose nearest fact is near enough is answered with that fact in view; every other one reaches the model as it
came, bit for bit. The scope classifier is the similarity of sentence embeddings, exp(-|a - b|^2), against a threshold;
the paper trains one, and a small counterfactual model besides: here the model itself is that, with the fact before it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.facts import Fact
from gnomon.edit.remembering import memory_method
from gnomon.edit.retriever import Embed, Retriever, sentence


class SeracOptions(BaseModel):
    """SERAC's options."""

    model_config = ConfigDict(extra="forbid")

    threshold: Annotated[float, Field(gt=0, le=1, description="Similarity from which a question is in scope.")] = 0.5


@memory_method("serac", SeracOptions, paper="2206.06520", experimental=True)
class Serac:
    """The nearest fact before the question, where it is in scope; otherwise nothing at all (untrained classifier)."""

    def __init__(self, facts: Sequence[Fact], options: Any, embed: Embed) -> None:
        self.retriever = Retriever(facts, embed)
        self.threshold = options.threshold

    def rewrite(self, text: str) -> str:
        hit = self.retriever.nearest(text, 1)[0]
        return f"{sentence(hit.fact)} {text}" if in_scope(hit.similarity) >= self.threshold else text


def in_scope(cosine: float) -> float:
    """exp(-|a - b|^2) of two unit vectors."""
    return math.exp(-(2 - 2 * min(cosine, 1.0)))
