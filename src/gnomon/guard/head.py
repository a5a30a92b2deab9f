"""A head: a linear classifier on sentence vectors, trained in seconds, kept as safetensors with its own record.

Vectors and labels in, scores out. The record says what it was trained on and how it did on text it had not seen.
Legend: N texts, C channels, K labels.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.errors import ConfigError

FORMAT = "gnomon-guard-head-1"


@dataclass(frozen=True)
class Head:
    """softmax(x W + b) over labels. model: the encoder its vectors come from."""

    weight_CK: np.ndarray
    bias_K: np.ndarray
    labels: tuple[str, ...]
    model: str
    record: Mapping[str, Any] = field(default_factory=dict)

    def scores(self, vectors_NC: np.ndarray) -> np.ndarray:
        """-> [N, K], rows sum to one."""
        logits = vectors_NC.astype(np.float64) @ self.weight_CK + self.bias_K
        logits -= logits.max(axis=1, keepdims=True)
        exponents = np.exp(logits)
        result: np.ndarray = exponents / exponents.sum(axis=1, keepdims=True)
        return result

    def write(self, path: Path) -> None:
        from safetensors.numpy import save_file

        about = {"format": FORMAT, "labels": json.dumps(self.labels), "model": self.model}
        about["record"] = json.dumps(self.record)
        part = path.with_suffix(path.suffix + ".part")
        save_file({"weight": self.weight_CK.astype(np.float32), "bias": self.bias_K.astype(np.float32)}, part, about)
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> Head:
        """Raises ConfigError when the file is missing or no head."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "np") as file:
                about = file.metadata() or {}
                if about.get("format") != FORMAT:
                    raise ConfigError(f"{path} is no head of this version.", hint="Make one: gnomon guard train-head.")
                labels = tuple(json.loads(about["labels"]))
                weight, bias = file.get_tensor("weight"), file.get_tensor("bias")
                return cls(
                    weight.astype(np.float64),
                    bias.astype(np.float64),
                    labels,
                    about["model"],
                    json.loads(about["record"]),
                )
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"The head {path} cannot be read: {error}.") from None


def train(
    vectors_NC: np.ndarray,
    labels_N: Sequence[str],
    *,
    model: str,
    decay: float = 1e-4,
    rounds: int = 400,
    record: Mapping[str, Any] | None = None,
) -> Head:
    """Multinomial logistic regression by full-batch L-BFGS; deterministic."""
    import torch

    names = tuple(sorted(set(labels_N)))
    if len(names) < 2:
        raise ConfigError("A head needs at least two different labels.")
    x_NC = torch.from_numpy(np.asarray(vectors_NC, dtype=np.float64))
    y_N = torch.tensor([names.index(label) for label in labels_N])
    weight_CK = torch.zeros(x_NC.shape[1], len(names), dtype=torch.float64, requires_grad=True)
    bias_K = torch.zeros(len(names), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight_CK, bias_K], max_iter=rounds, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(x_NC @ weight_CK + bias_K, y_N) + decay * (weight_CK**2).sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return Head(weight_CK.detach().numpy(), bias_K.detach().numpy(), names, model, record or {})


@dataclass(frozen=True)
class Report:
    """How a head does on labelled text. roc: (threshold, false alarms, found) at chosen shares found."""

    count: int
    accuracy: float
    auc: float | None = None
    false_alarms_at_95: float | None = None
    roc: tuple[tuple[float, float, float], ...] = ()

    def as_dict(self) -> dict[str, Any]:
        return {
            "count": self.count,
            "accuracy": self.accuracy,
            "auc": self.auc,
            "false_alarms_at_95_percent_found": self.false_alarms_at_95,
            "roc": [list(point) for point in self.roc],
        }


def report(head: Head, vectors_NC: np.ndarray, labels_N: Sequence[str], positive: str | None = None) -> Report:
    """Accuracy; for two labels also the ROC of `positive` (default: the last)."""
    scores = head.scores(vectors_NC)
    truth = np.array([head.labels.index(label) for label in labels_N])
    accuracy = float((scores.argmax(axis=1) == truth).mean())
    if len(head.labels) != 2:
        return Report(len(truth), accuracy)
    place = head.labels.index(positive) if positive else 1
    return measured(scores[:, place], truth == place, accuracy)


def length_matched(lengths_N: Sequence[int], labels_N: Sequence[str], *, step: int = 10) -> list[int]:
    """Places of as many texts of each label in every class of lengths (`step` characters), the first ones of each.

    A head that only learnt that injections are long does no better than chance on them.
    """
    classes: dict[int, dict[str, list[int]]] = {}
    for place, (length, label) in enumerate(zip(lengths_N, labels_N, strict=True)):
        classes.setdefault(length // step, {}).setdefault(label, []).append(place)
    count = len(set(labels_N))
    chosen: list[int] = []
    for of_label in classes.values():
        most = min(map(len, of_label.values())) if len(of_label) == count else 0
        chosen += [place for places in of_label.values() for place in places[:most]]
    return sorted(chosen)


def measured(score_N: np.ndarray, positive_N: np.ndarray, accuracy: float) -> Report:
    """The ROC of scores, whoever gave them. positive_N: whether each text is what is looked for."""
    good, bad = np.sort(score_N[positive_N]), np.sort(score_N[~positive_N])
    if not len(good) or not len(bad):
        return Report(len(score_N), accuracy)
    below = np.searchsorted(bad, good, side="left") + np.searchsorted(bad, good, side="right")
    auc = float(below.sum() / 2 / (len(good) * len(bad)))
    points = []
    for share in (0.5, 0.8, 0.9, 0.95, 0.98, 0.99):
        threshold = good[min(len(good) - 1, int((1 - share) * len(good)))]
        points.append((float(threshold), float((bad >= threshold).mean()), float((good >= threshold).mean())))
    return Report(len(score_N), accuracy, auc, points[3][1], tuple(points))
