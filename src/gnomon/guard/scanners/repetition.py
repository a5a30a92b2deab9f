"""Repetition: the text turns in circles, or one character runs on; a sign of bloat or of a model that lost its way."""

import itertools

from gnomon.guard.scanning import Judgement, scanner


@scanner(
    "repetition", about="Turns in circles: repeated word triples, runs of one character.", threshold=0.6, state="exact"
)
def repetition(text: str, *, prompt: str = "") -> Judgement:
    """The larger of: share of word triples seen before; length of the longest run of one character over 100."""
    words = text.split()
    triples = [tuple(words[i : i + 3]) for i in range(len(words) - 2)]
    circles = 1 - len(set(triples)) / len(triples) if len(triples) >= 10 else 0.0
    run = most = 0
    for before, after in itertools.pairwise(text):
        run = run + 1 if before == after and not after.isspace() else 0
        most = max(most, run)
    return Judgement(max(circles, min(1.0, most / 100)))
