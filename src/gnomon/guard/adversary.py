"""An adversary for a head: it disguises texts, and those that the head misses join its training (experimental).

The idea of a generator against a detector, with a generator of fixed moves instead of a network. Clean texts are
disguised as often as flagged ones, so that a head cannot learn that disguise itself is the crime. Texts and labels in,
a head and a record of every round out. Knows nothing of encoders.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from gnomon.guard.head import Head, train
from gnomon.guard.views import LEET, LOOKALIKES

Embed = Callable[[list[str]], np.ndarray]
Move = Callable[[str, random.Random], str]
DIGITS = {letter: digit for digit, letter in LEET.items()}
FILLERS = (
    "Thanks for your help so far.", "By the way, the weather is fine today.", "Here is some context for you.",
    "I have been working on this for a while.", "Please read carefully.", "This is for a school project.",
)  # fmt: skip


def _some(text: str, chance: random.Random, share: float, change: Callable[[str], str]) -> str:
    return "".join(change(letter) if chance.random() < share else letter for letter in text)


def leet(text: str, chance: random.Random) -> str:
    return _some(text, chance, 0.4, lambda letter: DIGITS.get(letter.lower(), letter))


def lookalike(text: str, chance: random.Random) -> str:
    return _some(text, chance, 0.3, lambda letter: chance.choice(LOOKALIKES.get(letter, letter)))


def invisible(text: str, chance: random.Random) -> str:
    return _some(text, chance, 0.2, lambda letter: letter + "\u200b")


def cases(text: str, chance: random.Random) -> str:
    return _some(text, chance, 0.5, str.swapcase)


def spaced(text: str, chance: random.Random) -> str:
    return " ".join(" ".join(word) if chance.random() < 0.4 else word for word in text.split(" "))


def filled(text: str, chance: random.Random) -> str:
    parts = [chance.choice(FILLERS), text, chance.choice(FILLERS)]
    return " ".join(parts[chance.randrange(2) : 2 + chance.randrange(2)])


def framed(text: str, chance: random.Random) -> str:
    return chance.choice(['The user wrote: "{}"', "<!-- {} -->", "Summary of the document: {}", "Q: {}\nA:"]).format(
        text
    )


MOVES: dict[str, Move] = {
    move.__name__: move for move in (leet, lookalike, invisible, cases, spaced, filled, framed)
}  # fmt: skip


def disguised(text: str, chance: random.Random) -> str:
    """One or two moves."""
    for move in chance.sample(list(MOVES.values()), 1 + chance.randrange(2)):
        text = move(text, chance)
    return text


@dataclass(frozen=True)
class Round:
    """Shares on texts that no round trained on: disguised ones missed, disguised clean ones flagged, and plain ones."""

    trained_on: int
    missed_disguised: float
    flagged_disguised_clean: float
    missed_plain: float
    flagged_plain_clean: float

    def as_dict(self) -> dict[str, Any]:
        return {name: round(value, 4) for name, value in asdict(self).items()}


def harden(
    texts: Sequence[tuple[str, str]],
    held_out: Sequence[tuple[str, str]],
    embed: Embed,
    *,
    model: str,
    positive: str = "1",
    rounds: int = 3,
    seed: int = 0,
) -> tuple[Head, list[Round]]:
    """Train, disguise, add what slipped through (and as many disguised clean texts), and so on.

    The first Round is before any disguise was seen; the last is that of the head that is returned. Deterministic.
    """
    chance, judge = random.Random(seed), random.Random(seed + 1)
    pool, vectors = list(texts), embed([text for text, _ in texts])
    tests = {
        "plain": (embed([text for text, _ in held_out]), held_out),
        "disguised": (embed([disguised(text, judge) for text, _ in held_out]), held_out),
    }
    head = train(vectors, [label for _, label in pool], model=model)
    history = [_measured(head, tests, positive, len(pool))]
    for _ in range(rounds):
        moved = [(disguised(text, chance), label) for text, label in texts]
        moved_vectors = embed([text for text, _ in moved])
        bad = np.array([label == positive for _, label in moved])
        slipped = np.flatnonzero(bad & (_scores(head, moved_vectors, positive) < 0.5))
        clean = np.flatnonzero(~bad)
        chosen = [*slipped, *chance.sample(list(clean), min(len(clean), max(len(slipped), 1)))]
        pool += [moved[place] for place in chosen]
        vectors = np.concatenate([vectors, moved_vectors[chosen]])
        head = train(vectors, [label for _, label in pool], model=model)
        history.append(_measured(head, tests, positive, len(pool)))
    return head, history


def _scores(head: Head, vectors: np.ndarray, positive: str) -> np.ndarray:
    result: np.ndarray = head.scores(vectors)[:, head.labels.index(positive)]
    return result


def _measured(head: Head, tests: dict[str, Any], positive: str, count: int) -> Round:
    shares = {}
    for name, (vectors, rows) in tests.items():
        flagged = _scores(head, vectors, positive) >= 0.5
        bad = np.array([label == positive for _, label in rows])
        shares[name] = (float((~flagged[bad]).mean()), float(flagged[~bad].mean()))
    return Round(count, shares["disguised"][0], shares["disguised"][1], shares["plain"][0], shares["plain"][1])
