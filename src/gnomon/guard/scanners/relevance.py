"""Relevance: the answer has nothing to do with the prompt, by sentence vectors. Not measured."""

from gnomon.guard.scanners.embedding import encoder, vectors
from gnomon.guard.scanning import Judgement, scanner


@scanner(
    "relevance",
    about="Not about what was asked (sentence vectors).",
    directions=("output",),
    threshold=0.8,
    needs=encoder,
)
def relevance(text: str, *, prompt: str = "") -> Judgement:
    if not prompt.strip():
        return Judgement(0.0)
    asked, said = vectors([prompt, text])
    return Judgement(float(min(1.0, max(0.0, 1 - asked @ said))))
