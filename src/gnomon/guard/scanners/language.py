"""Language: by script and the commonest words of a dozen languages. A baseline, not measured. Option: allowed."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from gnomon.guard.scanners.lexicon import words
from gnomon.guard.scanning import Judgement, scanner

COMMON = {
    "en": "the of and to in is that it you for was with are this have not be at what from",
    "de": "der die und das ist nicht ich sie zu ein eine mit den von wir auf für dass wie auch",
    "fr": "le la les de et est des un une que pour dans pas vous je qui sur avec ce il",
    "es": "el la de que y los en un por con no una para es se las del como más su",
    "it": "il di che è la per un non sono con una i le del si da come questo ma gli",
    "pt": "o de que e do da em um para não com uma os no se na por mais as dos",
    "nl": "de het een en van ik te dat die is niet zijn op voor met er maar we om aan",
    "pl": "nie w na się że to jest z do i jak co po tak ale za od czy dla był",
    "sv": "och att det som en på är av för med den till inte om ett men jag har de vi",
    "tr": "bir ve bu için ne da de var ben mi çok o sen ile daha ama gibi kadar evet hayır",
}
SCRIPTS = {
    "CYRILLIC": "ru", "ARABIC": "ar", "HEBREW": "he", "HANGUL": "ko", "HIRAGANA": "ja", "KATAKANA": "ja", "CJK": "zh",
    "GREEK": "el", "DEVANAGARI": "hi", "THAI": "th", "GEORGIAN": "ka", "ARMENIAN": "hy", "BENGALI": "bn",
}  # fmt: skip


def guess(text: str) -> tuple[str, float]:
    """(language, how sure 0..1); "" when nothing tells."""
    letters = [c for c in text if c.isalpha()][:2000]
    if not letters:
        return "", 0.0
    scripts: dict[str, int] = {}
    for letter in letters:
        name = SCRIPTS.get(unicodedata.name(letter, "").split(" ")[0], "latin")
        scripts[name] = scripts.get(name, 0) + 1
    best = "ja" if scripts.get("ja", 0) > 0.1 * len(letters) else max(scripts, key=lambda key: scripts[key])
    if best != "latin":
        return best, scripts[best] / len(letters)
    found = words(text)
    counts = {name: sum(word in set(common.split()) for word in found) for name, common in COMMON.items()}
    name = max(counts, key=lambda key: counts[key])
    others = sorted(counts.values())[-2]
    return (name, min(1.0, (counts[name] - others + 1) / 3)) if counts[name] > others else ("", 0.0)


@scanner("language", about="Another language than `allowed` (script and common words).", threshold=0.6)
def language(text: str, *, prompt: str = "", allowed: Sequence[str] = ("en",)) -> Judgement:
    name, sure = guess(text)
    return Judgement(sure if name and name not in allowed else 0.0, name)


@scanner("language_same", about="Another language than the prompt's.", directions=("output",), threshold=0.6)
def language_same(text: str, *, prompt: str = "") -> Judgement:
    name, sure = guess(text)
    asked, also = guess(prompt)
    return Judgement(min(sure, also) if name and asked and name != asked else 0.0, name)
