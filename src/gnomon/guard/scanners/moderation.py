"""Moderation categories in OpenAI's words, by small word lists. A baseline, not measured on labelled data."""

from __future__ import annotations

from gnomon.guard.scanners.bias import bias
from gnomon.guard.scanners.lexicon import parse, weighed
from gnomon.guard.scanners.toxicity import toxicity
from gnomon.guard.scanning import Judgement, scanner

LISTS = {
    "harassment/threatening": "0.9: i will kill you, i will hurt you\n0.7: hurt you, beat you up, find you",
    "illicit": "0.6: counterfeit, launder money, steal a car, fake id\n0.8: cook meth, make meth, buy cocaine",
    "illicit/violent": "0.9: build a bomb, make a bomb, pipe bomb, nerve agent\n0.7: explosive device, ghost gun",
    "self-harm": "0.8: self-harm, cutting myself, hurt myself, suicide, kill myself",
    "self-harm/intent": "0.9: i want to die, i want to kill myself, end my life, going to kill myself",
    "self-harm/instructions": "0.9: how to kill myself, how to kill yourself, painless suicide, ways to cut yourself",
    "sexual": "0.7: porn, blowjob, naked, nude, orgasm, sex with, erotic, masturbate\n0.4: sexy, horny",
    "sexual/minors": "0.95: child porn, underage sex, sex with a child, sex with a minor, preteen nude",
    "violence": "0.6: stab, shoot him, shoot them, murder, massacre, torture, strangle, kill them, kill him, behead",
    "violence/graphic": "0.8: guts spilled, blood sprayed, dismember, disembowel, severed head, mutilated",
}
CATEGORIES = ("harassment", "hate", "hate/threatening", *LISTS)


def categories(text: str) -> dict[str, float]:
    """A score per category; a kind within a kind counts for both."""
    scores = {name: weighed(text, parse(table)) for name, table in LISTS.items()}
    scores["harassment"] = max(toxicity(text).score, scores["harassment/threatening"])
    scores["hate"] = bias(text).score
    scores["hate/threatening"] = min(scores["hate"], max(scores["violence"], scores["harassment/threatening"]))
    for name in list(scores):
        if "/" in name:
            kind = name.partition("/")[0]
            scores[kind] = max(scores[kind], scores[name])
    return scores


@scanner("moderation", about="OpenAI's moderation categories (word lists).")
def moderation(text: str, *, prompt: str = "") -> Judgement:
    scores = categories(text)
    worst = max(scores, key=lambda name: scores[name])
    return Judgement(scores[worst], worst if scores[worst] else "")
