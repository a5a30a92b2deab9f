"""Prompt injection: a small head on sentence vectors (`gnomon guard train-head`). None is shipped."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gnomon.errors import ConfigError
from gnomon.guard.head import Head
from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanning import Judgement, scanner


@scanner("injection", about="Prompt injection by a `head` of `gnomon guard train-head` on labelled texts.")
def injection(text: str, *, prompt: str = "", head: str = "", positive: str = "1") -> Judgement:
    if not head:
        raise ConfigError(
            "`injection` needs `head`: a file made by gnomon guard train-head from labelled texts.",
            hint="Without one, the rule pack `injection-phrases` finds the plainest turns of phrase.",
            param="options.head",
        )
    chosen = _head(head)
    scores = chosen.scores(vectors([text], chosen.model))[0]
    return Judgement(float(scores[chosen.labels.index(positive)]) if positive in chosen.labels else 0.0)


@cache
def _head(path: str) -> Head:
    return Head.read(Path(path))
