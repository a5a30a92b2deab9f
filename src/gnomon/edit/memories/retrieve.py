"""Retrieval: the facts nearest to the question stand before it. The baseline that editing must be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.facts import Fact
from gnomon.edit.remembering import memory_method
from gnomon.edit.retriever import Embed, Retriever, sentence


class RetrieveOptions(BaseModel):
    """Retrieval's options."""

    model_config = ConfigDict(extra="forbid")

    count: Annotated[int, Field(gt=0, le=32, description="Most facts shown.")] = 3
    least: Annotated[float, Field(ge=-1, le=1, description="Cosine that a shown fact has at least.")] = 0.4


@memory_method("retrieve", RetrieveOptions, paper="retrieval augmentation")
class Retrieve:
    """The nearest facts before the question, the nearest one last."""

    def __init__(self, facts: Sequence[Fact], options: Any, embed: Embed) -> None:
        self.retriever, self.options = Retriever(facts, embed), options

    def rewrite(self, text: str) -> str:
        hits = self.retriever.nearest(text, self.options.count)
        told = [sentence(hit.fact) for hit in reversed(hits) if hit.similarity >= self.options.least]
        return " ".join([*told, text])
