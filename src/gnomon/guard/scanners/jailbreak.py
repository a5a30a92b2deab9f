"""Jailbreak shapes: optimised suffixes (signs and fragments where words should be), role-play overrides. Not measured.

With `model` the tail's perplexity under that model decides (`perplexity` is the bar; calibrate it on your own prompts).
"""

from __future__ import annotations

import re
from functools import cache
from typing import Any

from gnomon.guard.scanning import Judgement, scanner

OVERRIDES = re.compile(
    r"(?i)\b(?:do anything now|DAN mode|developer mode|no (?:restrictions|limitations|filters)|stay in character"
    r"|without (?:any )?(?:moral|ethical|restrictions)|jailbr(?:eak|oken)|begin with [\"']sure|respond as both)\b"
)
ODD = re.compile(r"[^\w\s,.;:!?'\"()-]|[a-z][A-Z]|\w[!?;:({\[\\/]+\w|(?:^|\s)[^\w\s]{2,}")


@cache
def _model(reference: str) -> Any:
    from gnomon.loading import load

    return load(reference)


def opened(*, model: str = "", **others: Any) -> None:
    """The model whose perplexity is asked, if there is one."""
    if model:
        _model(model)


@scanner(
    "jailbreak",
    about="Optimised suffixes and role-play overrides (shapes; `model`: perplexity).",
    directions=("input",),
    needs=opened,
)
def jailbreak(text: str, *, prompt: str = "", model: str = "", perplexity: float = 2000.0) -> Judgement:
    overrides = len(OVERRIDES.findall(text))
    tail = text.split()[-20:]
    odd = sum(bool(ODD.search(word)) for word in tail) / max(len(tail), 1) if len(tail) >= 8 else 0.0
    score = max(min(1.0, 0.6 * overrides), min(1.0, odd * 1.6))
    if model and len(tail) >= 20:
        value = _model(model).score(" ".join(text.split()[:-20]) or "\n", " " + " ".join(tail)).perplexity
        score = max(score, min(1.0, 0.5 * value / perplexity))
    return Judgement(score)
