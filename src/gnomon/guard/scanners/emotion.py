"""Emotion: strong emotions by a small word list. A baseline, not measured. Option: blocked (names of emotions)."""

from collections.abc import Sequence

from gnomon.guard.scanners.lexicon import weighed
from gnomon.guard.scanning import Judgement, scanner

EMOTIONS = {
    "anger": {"furious": 0.8, "angry": 0.6, "rage": 0.7, "hate": 0.5, "outraged": 0.7, "pissed": 0.7},
    "fear": {"terrified": 0.8, "afraid": 0.6, "scared": 0.6, "panic": 0.7, "anxious": 0.5, "dread": 0.6},
    "sadness": {"sad": 0.5, "hopeless": 0.7, "depressed": 0.7, "grief": 0.7, "crying": 0.6, "heartbroken": 0.8},
    "disgust": {"disgusting": 0.7, "revolting": 0.8, "gross": 0.5, "sickening": 0.7, "vile": 0.7},
    "joy": {"happy": 0.5, "delighted": 0.7, "joyful": 0.7, "thrilled": 0.8, "ecstatic": 0.8},
}


@scanner("emotion", about="Strong emotions; option `blocked` names which (word list).")
def emotion(text: str, *, prompt: str = "", blocked: Sequence[str] = ("anger", "fear", "disgust")) -> Judgement:
    scores = {name: weighed(text, EMOTIONS[name]) for name in blocked if name in EMOTIONS}
    name = max(scores, key=lambda key: scores[key], default="")
    return Judgement(scores.get(name, 0.0), name if scores.get(name) else "")
