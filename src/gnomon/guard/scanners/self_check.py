"""Hallucination self-check: other answers to the same prompt say something else (SelfCheckGPT's idea, 2303.08896).

Draws `samples` answers from `model` and compares sentence vectors. Not measured; costs `samples` answers.
"""

from __future__ import annotations

from typing import Any

from gnomon.errors import ConfigError
from gnomon.guard.scanners.embedding import encoder, vectors
from gnomon.guard.scanners.jailbreak import _model
from gnomon.guard.scanning import Judgement, scanner


def given_model(*, model: str = "", **others: Any) -> None:
    """The model that is asked, and the encoder that compares."""
    if not model:
        raise ConfigError("`self_check` needs `model`: who is asked again.", param="options.model")
    _model(model)
    encoder()


@scanner(
    "self_check",
    about="Other answers of `model` disagree (costs `samples` answers).",
    directions=("output",),
    needs=given_model,
)
def self_check(text: str, *, prompt: str = "", model: str = "", samples: int = 2, max_tokens: int = 64) -> Judgement:
    if not prompt.strip():
        return Judgement(0.0)
    given_model(model=model)
    drawn = _model(model).chat(prompt, n=samples, temperature=1.0, seed=1, max_tokens=max_tokens)
    others = [one.text for one in (drawn if isinstance(drawn, list) else [drawn])]
    found = vectors([text, *others])
    return Judgement(float(min(1.0, max(0.0, 1 - (found[1:] @ found[0]).mean()))))
