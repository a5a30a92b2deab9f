"""Hallucination self-check: other answers to the same prompt say something else (SelfCheckGPT's idea, 2303.08896).

Draws `samples` answers from `model` and compares sentence vectors. Not measured; costs `samples` answers.
"""

from __future__ import annotations

from gnomon.guard.scanners.embedding import vectors
from gnomon.guard.scanning import Judgement, scanner


@scanner("self_check", about="Other answers of `model` disagree (costs `samples` answers).", directions=("output",))
def self_check(text: str, *, prompt: str = "", model: str = "", samples: int = 2, max_tokens: int = 64) -> Judgement:
    from gnomon.guard.scanners.jailbreak import _model

    if not model or not prompt.strip():
        return Judgement(0.0, "no model" if not model else "")
    drawn = _model(model).chat(prompt, n=samples, temperature=1.0, seed=1, max_tokens=max_tokens)
    others = [one.text for one in (drawn if isinstance(drawn, list) else [drawn])]
    found = vectors([text, *others])
    return Judgement(float(min(1.0, max(0.0, 1 - (found[1:] @ found[0]).mean()))))
