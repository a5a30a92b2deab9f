"""Sentiment: how negative a text sounds, by a small word list. A baseline, not measured."""

from gnomon.guard.scanners.lexicon import words
from gnomon.guard.scanning import Judgement, scanner

GOOD = set(
    words(
        """good great excellent wonderful love like happy glad thanks thank nice best beautiful perfect enjoy helpful
        amazing pleased fantastic awesome fine joy delighted brilliant"""
    )
)
BAD = set(
    words(
        """bad terrible awful horrible hate angry sad worst ugly broken useless annoying disappointed poor wrong fail
        failed pain hurt disgusting stupid lost boring nasty miserable furious"""
    )
)
TURNS = set(words("not no never don't doesn't isn't wasn't can't won't"))


@scanner("sentiment", about="Negative sentiment (word list).", threshold=0.6)
def sentiment(text: str, *, prompt: str = "") -> Judgement:
    balance, turned = 0, False
    found = words(text)
    for word in found:
        value = (word in GOOD) - (word in BAD)
        balance += -value if turned else value
        turned = word in TURNS or (turned and not value)
    strength = abs(balance) / (abs(balance) + 2)
    return Judgement(0.5 + strength / 2 if balance < 0 else 0.5 - strength / 2)
