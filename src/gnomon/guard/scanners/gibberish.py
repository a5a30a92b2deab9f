"""Gibberish: letters that do not run like words, by vowels, doubled letters and unlikely pairs. Not measured."""

from gnomon.guard.scanners.lexicon import words
from gnomon.guard.scanning import Judgement, scanner

VOWELS = set("aeiouyäöüéèáóíú")
RARE = {a + b for a in "qxzjvwk" for b in "bcdfgjkpqvwxz"} | {"wq", "hx", "fq", "gx", "bx", "cx", "dx", "mx", "px"}


@scanner("gibberish", about="Letters that do not run like words.", threshold=0.7)
def gibberish(text: str, *, prompt: str = "") -> Judgement:
    found = [word for word in words(text) if word.isascii() and len(word) > 3]
    if not found:
        return Judgement(0.0)
    return Judgement(sum(_odd(word) for word in found) / len(found))


def _odd(word: str) -> bool:
    run = most = 0
    for letter in word:
        run = 0 if letter in VOWELS else run + 1
        most = max(most, run)
    pairs = [word[i : i + 2] for i in range(len(word) - 1)]
    share = sum(letter in VOWELS for letter in word) / len(word)
    return most >= 5 or share < 0.15 or share > 0.85 or any(pair in RARE for pair in pairs)
