"""A pair ranker: which of two answers to a prompt is better, learned from pairs that somebody judged.

The idea is LLM-Blender's (arXiv 2306.02561), with a small head of our own in place of a cross-encoder: an embedding
model reads answers and prompt, a linear head weighs what it sees, and the difference of two scores is the log-odds that
the first is preferred (Bradley-Terry). Fitted by Newton's method in float64: the same pairs give the same head.
Legend: N pairs, F features, C the embedding's channels.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gnomon.errors import UsageError
from gnomon.model import Model

ROUNDS = 25
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Preference:
    """One judgement."""

    prompt: str
    better: str
    worse: str


@dataclass(frozen=True)
class PairRanker:
    """model: any model with `embed`. weights_F: the head."""

    model: Model
    weights_F: Array

    @classmethod
    def fit(cls, model: Model, preferences: Sequence[Preference], *, penalty: float = 1.0) -> PairRanker:
        """penalty: of the weights' squares (the features have unit length). Raises UsageError for no pairs."""
        if not preferences:
            raise UsageError("A ranker learns from pairs.", hint="Give preferences.", param="preferences")
        if not penalty > 0:
            raise UsageError(f"The penalty is {penalty}; it is above 0.", param="penalty")
        better = features(model, [(p.prompt, p.better) for p in preferences])
        worse = features(model, [(p.prompt, p.worse) for p in preferences])
        return cls(model, fit_weights(better - worse, penalty))

    def scores(self, prompt: str, answers: Sequence[str]) -> list[float]:
        """One number per answer; the difference of two is the log-odds that the first is preferred."""
        return [float(s) for s in features(self.model, [(prompt, answer) for answer in answers]) @ self.weights_F]

    def prefers(self, prompt: str, first: str, second: str) -> float:
        """The probability that the first answer is the better one."""
        a, b = self.scores(prompt, [first, second])
        return float(1 / (1 + np.exp(b - a)))

    def best(self, prompt: str, answers: Sequence[str]) -> int:
        """The place of the answer that wins against all others; the first among equals."""
        if not answers:
            raise UsageError("There is no answer to rank.", param="answers")
        return int(np.argmax(self.scores(prompt, answers)))

    def save(self, path: str | Path) -> None:
        """The head and the identity of the embedding model it belongs to, as JSON; replaced in one step."""
        target = Path(path)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        content = {"embedding": self.model.checkpoint.identity, "weights": [float(w) for w in self.weights_F]}
        partial.write_text(json.dumps(content) + "\n", encoding="utf-8")
        partial.replace(target)

    @classmethod
    def load(cls, path: str | Path, model: Model) -> PairRanker:
        """Raises UsageError for a file that is none, or one of another embedding model."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            identity, weights = content["embedding"], np.array(content["weights"], dtype=np.float64)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} is no ranker: {error!r}.", param="ranker") from None
        if identity != model.checkpoint.identity:
            raise UsageError(
                f"The ranker {path} was fitted on another embedding model than `{model.name}`.",
                hint="Load the model it was fitted on, or fit it again.",
                param="ranker",
            )
        return cls(model, weights)


def features(model: Model, pairs: Sequence[tuple[str, str]]) -> Array:
    """(prompt, answer) -> [n, F]: the answer's embedding, and its product with the prompt's, each of unit length."""
    prompts = sorted({prompt for prompt, _ in pairs})
    vectors = model.embed([*prompts, *(answer for _, answer in pairs)]).double().numpy()
    place = {prompt: index for index, prompt in enumerate(prompts)}
    asked = vectors[[place[prompt] for prompt, _ in pairs]]
    answered = vectors[len(prompts) :]
    product = asked * answered
    length = np.linalg.norm(product, axis=1, keepdims=True)
    return np.concatenate([answered, product / np.maximum(length, 1e-12)], axis=1)


def fit_weights(differences_NF: Array, penalty: float) -> Array:
    """Logistic regression without an intercept: every difference should score above 0 -> [F]."""
    size = differences_NF.shape[1]
    weights_F = np.zeros(size)
    for _ in range(ROUNDS):
        right_N = 1 / (1 + np.exp(-(differences_NF @ weights_F)))
        gradient_F = differences_NF.T @ (1 - right_N) - penalty * weights_F
        curvature_N = right_N * (1 - right_N)
        hessian_FF = (differences_NF * curvature_N[:, None]).T @ differences_NF + penalty * np.eye(size)
        step_F = np.linalg.solve(hessian_FF, gradient_F)
        weights_F = weights_F + step_F
        if float(np.abs(step_F).max()) < 1e-10:
            break
    return weights_F
