"""Banned topics: nearness of the text to descriptions of topics, by sentence vectors. Not measured. Option: topics."""

from collections.abc import Sequence

from gnomon.guard.scanners.embedding import encoder, vectors
from gnomon.guard.scanning import Judgement, scanner


@scanner("ban_topics", about="About one of `topics` (sentence vectors).", threshold=0.4, needs=encoder)
def ban_topics(text: str, *, prompt: str = "", topics: Sequence[str] = ("violence", "weapons", "drugs")) -> Judgement:
    found = vectors([text, *(f"This text is about {topic}." for topic in topics)])
    near = found[1:] @ found[0]
    best = int(near.argmax())
    return Judgement(float(max(near[best], 0.0)), topics[best])
