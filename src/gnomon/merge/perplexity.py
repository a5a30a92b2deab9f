"""How well a model predicts a text: negative log-likelihood in windows, for reports and sweeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.model import Model

WINDOW = 512


@dataclass(frozen=True)
class TextLoss:
    """windows: summed negative log-likelihood (nats) and number of tokens of each window."""

    windows: tuple[tuple[float, int], ...]

    @property
    def tokens(self) -> int:
        return sum(count for _, count in self.windows)

    @property
    def mean(self) -> float:
        """Nats per token."""
        return math.fsum(loss for loss, _ in self.windows) / max(1, self.tokens)

    @property
    def perplexity(self) -> float:
        return math.exp(min(700.0, self.mean))


def text_loss(model: Model, text: str, *, window: int = WINDOW, most_tokens: int | None = None) -> TextLoss:
    """Each window is read afresh; its first token is given, not counted."""
    ids = model.encode(text)[:most_tokens]
    window = min(window, model.max_context)
    windows = []
    for start in range(0, len(ids) - 1, window - 1):
        part = ids[start : start + window]
        if len(part) < 2:
            break
        rows = model.worker.logits(part)[:-1].float()
        picked = torch.log_softmax(rows, dim=-1).gather(1, torch.tensor(part[1:])[:, None])
        windows.append((-float(picked.double().sum()), len(part) - 1))
    if not windows:
        raise UsageError("The text is too short to measure: it has fewer than two tokens.", param="text")
    return TextLoss(tuple(windows))


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The text {path} cannot be read: {error}.", param="text") from None
