"""Prompt injection: a small head on sentence vectors (`gnomon guard train-head`), measured on labelled data."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from gnomon.guard.head import Head
from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanning import Judgement, scanner

SHIPPED = Path(__file__).parents[1] / "heads" / "injection.safetensors"


@scanner("injection", about="Prompt injection (trained head; see docs/guard.md).", threshold=0.5, state="measured")
def injection(text: str, *, prompt: str = "", head: str = "") -> Judgement:
    chosen = _head(head or str(SHIPPED))
    scores = chosen.scores(vectors([text], chosen.model))[0]
    return Judgement(float(scores[1]))


@cache
def _head(path: str) -> Head:
    return Head.read(Path(path))
