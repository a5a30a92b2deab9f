"""MemPrompt: what a user once corrected comes back with every similar question (arXiv 2201.06009).

The memory's keys are the questions as they were asked (the facts' prompts), its values the corrections; a similar new
question is asked again together with the correction. The paper learns the key; here it is a sentence embedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.facts import Fact
from gnomon.edit.remembering import memory_method
from gnomon.edit.retriever import Embed, sentence


class MemPromptOptions(BaseModel):
    """MemPrompt's options."""

    model_config = ConfigDict(extra="forbid")

    least: Annotated[float, Field(ge=-1, le=1, description="Cosine from which questions count as similar.")] = 0.6


@memory_method("memprompt", MemPromptOptions, paper="2201.06009")
class MemPrompt:
    """The correction of the most similar earlier question, where one is similar enough."""

    def __init__(self, facts: Sequence[Fact], options: Any, embed: Embed) -> None:
        self.facts, self.embed, self.least = tuple(facts), embed, options.least
        self.vectors_NC = embed([fact.prompt for fact in facts])

    def rewrite(self, text: str) -> str:
        near = (self.vectors_NC @ self.embed([text])[0]).tolist()
        best = max(range(len(near)), key=lambda i: (near[i], -i))
        if near[best] < self.least:
            return text
        fact = self.facts[best]
        return f"Earlier question: {fact.prompt}\nCorrection: {sentence(fact)}\nQuestion: {text}"
