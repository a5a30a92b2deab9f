"""Intents: which of the kinds that a head was trained on a text is; found is what is none that is wanted.

The shipped head knows the 77 things a bank's customers ask (benchmarks/guard_heads.py has its figures); a head of your
own business comes from `gnomon guard train-head`. Options: head, allowed (default: any intent it knows).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gnomon.errors import ConfigError
from gnomon.guard.head import Head
from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanners.injection import _head
from gnomon.guard.scanning import Judgement, scanner
from gnomon.registry import nearest

SHIPPED = Path(__file__).parents[1] / "heads" / "intents.safetensors"


def _scores(text: str, head: Head) -> np.ndarray:
    found: np.ndarray = head.scores(vectors([text], head.model))[0]
    return found


def loaded(*, head: str = "", allowed: Sequence[str] = ()) -> None:
    """The head and its encoder. Raises ConfigError for a head that cannot be read, or an intent it does not know."""
    chosen = _head(head or str(SHIPPED))
    for name in allowed:
        if name not in chosen.labels:
            hint = nearest(name, chosen.labels)
            raise ConfigError(f"The head knows no intent `{name}`.", hint=hint, param="options.allowed")
    _scores("a", chosen)


@scanner(
    "intents",
    about="No intent of `allowed`, by a `head` (shipped: a bank's 77; AUC 0.99 among them, 0.97 against others).",
    directions=("input",),
    state="measured",
    needs=loaded,
)
def intents(text: str, *, prompt: str = "", head: str = "", allowed: Sequence[str] = ()) -> Judgement:
    """Without `allowed` the probability that the likeliest intent is not it; else that of all that are not allowed."""
    chosen = _head(head or str(SHIPPED))
    scores = _scores(text, chosen)
    best = int(scores.argmax())
    wanted = [place for place, label in enumerate(chosen.labels) if label in allowed] or [best]
    return Judgement(min(1.0, max(0.0, 1 - float(scores[wanted].sum()))), chosen.labels[best])
