"""MeLLo: multi-hop questions answered over edited facts (arXiv 2305.14795).

A question is taken apart one hop at a time: the model asks itself a subquestion and answers it from what it knows; the
nearest remembered fact is held against that answer; where the two contradict each other, the fact wins. In go a way to
ask a model for text, facts and a question; out comes the answer with every hop. The worked example that shows the form
is ours; a model must be able to follow it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gnomon.edit.facts import Fact
from gnomon.edit.retriever import Embed, Retriever, sentence
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.model import Model

Ask = Callable[[str, str], str]
"""(prompt, stop) -> what the model writes before `stop`."""
HOPS = 4
SUBQUESTION, TENTATIVE, RETRIEVED, VERDICT, HOP, FINAL = (
    "Subquestion:", "Tentative answer:", "Known fact:", "The fact", "So:", "Final answer:",
)  # fmt: skip
CONTRADICTS, AGREES = "contradicts the tentative answer.", "does not contradict the tentative answer."
EXAMPLE = f"""Question: In which country was the painter of the Night Watch born?
{SUBQUESTION} Who painted the Night Watch?
{TENTATIVE} Rembrandt
{RETRIEVED} The Night Watch was painted by Goya.
{VERDICT} {CONTRADICTS}
{HOP} Goya
{SUBQUESTION} In which country was Goya born?
{TENTATIVE} Spain
{RETRIEVED} Big Ben stands in Vienna.
{VERDICT} {AGREES}
{HOP} Spain
{FINAL} Spain

"""


@dataclass(frozen=True)
class Hop:
    """One step. answer: what counts, the fact's where it contradicts the tentative one."""

    question: str
    tentative: str
    fact: Fact
    contradicts: bool
    answer: str


@dataclass(frozen=True)
class Answer:
    """text: the final answer, None when none came in as many hops as were allowed."""

    text: str | None
    hops: tuple[Hop, ...]


def answer(ask: Ask, facts: Sequence[Fact], embed: Embed, question: str, *, hops: int = HOPS) -> Answer:
    """Answer a question hop by hop. Raises UsageError without facts or a question."""
    if not facts or not question.strip():
        raise UsageError("MeLLo needs facts and a question.", param="facts")
    memory = Retriever(facts, embed)
    told = f"{EXAMPLE}Question: {question.strip()}\n"
    taken: list[Hop] = []
    for _ in range(hops + 1):
        line = ask(told, "\n").strip()
        if line.startswith(FINAL):
            return Answer(line.removeprefix(FINAL).strip(), tuple(taken))
        if not line.startswith(SUBQUESTION) or len(taken) == hops:
            break
        told += f"{line}\n{TENTATIVE}"
        tentative = ask(told, "\n").strip()
        asked = line.removeprefix(SUBQUESTION).strip()
        fact = memory.nearest(asked, 1)[0].fact
        told += f" {tentative}\n{RETRIEVED} {sentence(fact)}\n{VERDICT}"
        contradicts = ask(told, "\n").strip().startswith(CONTRADICTS.split()[0])
        said = fact.target.strip() if contradicts else tentative
        told += f" {CONTRADICTS if contradicts else AGREES}\n{HOP} {said}\n"
        taken.append(Hop(asked, tentative, fact, contradicts, said))
    return Answer(None, tuple(taken))


def asking(model: Model, *, tokens: int = 32) -> Ask:
    """A model as `ask`: greedy, at most so many tokens a line."""

    def ask(prompt: str, stop: str) -> str:
        return model.generate(prompt, max_tokens=tokens, temperature=0.0, stop=[stop]).text

    return ask
