"""Prompt injection: a small linear head on sentence vectors.

The shipped one was trained by benchmarks/guard_heads.py (its record says on what, and how it did elsewhere);
`gnomon guard train-head` makes another.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gnomon.errors import ConfigError
from gnomon.guard.head import Head
from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanning import Judgement, scanner

SHIPPED = Path(__file__).parents[1] / "heads" / "injection.safetensors"


@scanner("injection", about="Prompt injection by a linear `head` on sentence vectors (measured: see the page).")
def injection(text: str, *, prompt: str = "", head: str = "", positive: str = "1") -> Judgement:
    chosen = _head(head or str(SHIPPED))
    if positive not in chosen.labels:
        raise ConfigError(f"The head has no label `{positive}`.", hint=f"It has: {', '.join(chosen.labels)}.")
    scores = chosen.scores(vectors([text], chosen.model))[0]
    return Judgement(float(scores[chosen.labels.index(positive)]))


@cache
def _head(path: str) -> Head:
    return Head.read(Path(path))
