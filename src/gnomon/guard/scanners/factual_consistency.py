"""Factual consistency: numbers and names of the answer that the prompt (the source) does not have. Not measured."""

import re

from gnomon.guard.scanning import Judgement, scanner

FACT = re.compile(r"\b(?:\d[\d.,:%]*|[A-ZÄÖÜ][\w'-]+(?:\s+[A-ZÄÖÜ][\w'-]+)*)\b")


@scanner(
    "factual_consistency", about="Names and numbers that the prompt has not.", directions=("output",), threshold=0.75
)
def factual_consistency(text: str, *, prompt: str = "") -> Judgement:
    sentences = re.split(r"(?<=[.!?])\s+", text)
    facts = [f for s in sentences for i, f in enumerate(FACT.findall(s)) if i or any(c.isdigit() for c in f)]
    if not facts or not prompt:
        return Judgement(0.0)
    unknown = [fact for fact in facts if fact.lower() not in prompt.lower()]
    return Judgement(len(unknown) / len(facts), f"{len(unknown)} of {len(facts)}")
