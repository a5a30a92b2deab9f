"""Intents: which of the kinds that a head was trained on a text is. Options: head, allowed."""

from __future__ import annotations

from collections.abc import Sequence

from gnomon.errors import ConfigError
from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanners.injection import _head
from gnomon.guard.scanning import Judgement, scanner


@scanner("intents", about="None of the `allowed` intents of a trained `head`.", directions=("input",))
def intents(text: str, *, prompt: str = "", head: str = "", allowed: Sequence[str] = ()) -> Judgement:
    if not head:
        raise ConfigError("`intents` needs `head`: a file made by gnomon guard train-head.", param="options.head")
    chosen = _head(head)
    scores = chosen.scores(vectors([text], chosen.model))[0]
    best = int(scores.argmax())
    share = sum(float(score) for label, score in zip(chosen.labels, scores, strict=True) if label in allowed)
    return Judgement(1 - share if allowed else 0.0, chosen.labels[best])
