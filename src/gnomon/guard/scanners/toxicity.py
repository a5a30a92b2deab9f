"""Toxicity: insults, threats and slurs by a small word list. A baseline, not measured on labelled data."""

from gnomon.guard.scanners.lexicon import parse, weighed
from gnomon.guard.scanning import Judgement, scanner

WORDS = """
0.9: kill yourself, you should die, i will kill you, go die, piece of shit, fuck you, subhuman
0.7: idiot, moron, imbecile, bastard, asshole, scum, retard, bitch, whore, cunt, motherfucker, hurt you, beat you up
0.45: stupid, loser, pathetic, worthless, disgusting, shut up, dumb, hate you, fuck, shit, vermin, filthy
"""


@scanner("toxicity", about="Insults, threats and slurs (word list).")
def toxicity(text: str, *, prompt: str = "") -> Judgement:
    return Judgement(weighed(text, parse(WORDS)))
