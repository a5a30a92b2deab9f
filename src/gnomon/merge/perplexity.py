"""How well a model predicts a text: negative log-likelihood in windows, for reports, sweeps and evolution.

A .jsonl file of {"prompt": ..., "completion": ...} is a set of examples: only completions are counted, and each example
is a window of its own.
"""

from __future__ import annotations

import json
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
class Examples:
    """(prompt, completion) pairs."""

    pairs: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """As running text."""
        return "\n\n".join(prompt + completion for prompt, completion in self.pairs)


Text = str | Examples


def halves(text: Text) -> tuple[Text, Text]:
    """The first half to search on, the second to judge by. Raises UsageError for fewer than two examples."""
    if isinstance(text, str):
        return text[: len(text) // 2], text[len(text) // 2 :]
    middle = len(text.pairs) // 2
    if middle == 0:
        raise UsageError("One example cannot be halved: give at least two.", param="text")
    return Examples(text.pairs[:middle]), Examples(text.pairs[middle:])


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


def text_loss(model: Model, text: Text, *, window: int = WINDOW, most_tokens: int | None = None) -> TextLoss:
    """Each window is read afresh; its first token is given, not counted. most_tokens: read, prompts included."""
    window = min(window, model.max_context)
    parts = _examples(model, text, most_tokens) if isinstance(text, Examples) else None
    if parts is None:
        ids = model.encode(str(text))[:most_tokens]
        parts = [(ids[start : start + window], 1) for start in range(0, len(ids) - 1, window - 1)]
    windows = []
    for whole, given in parts:
        part = whole[:window]
        if len(part) <= given:
            continue
        rows = model.worker.logits(part)[given - 1 : -1].float()
        picked = torch.log_softmax(rows, dim=-1).gather(1, torch.tensor(part[given:])[:, None])
        windows.append((-float(picked.double().sum()), len(part) - given))
    if not windows:
        raise UsageError("The text is too short to measure: it has fewer than two tokens.", param="text")
    return TextLoss(tuple(windows))


def _examples(model: Model, text: Examples, most_tokens: int | None) -> list[tuple[list[int], int]]:
    """(token ids, how many of them are given) of the examples that fit into so many tokens."""
    parts, read = list[tuple[list[int], int]](), 0
    for prompt, completion in text.pairs:
        before, ids = model.encode(prompt), model.encode(prompt + completion)
        read += len(ids)
        if most_tokens is not None and read > most_tokens and parts:
            break
        # a token that spans prompt and completion is counted: the prompt does not give it
        given = next((i for i, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), len(before))
        parts.append((ids, max(1, given)))
    return parts


def read_text(path: Path) -> Text:
    """A text, or the examples of a .jsonl file. Raises UsageError with the line."""
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The text {path} cannot be read: {_why(error)}.", param="text") from None
    if not content.strip():
        raise UsageError(f"The text {path} is empty.", param="text")
    if path.suffix != ".jsonl":
        return content
    pairs = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, completion = row["prompt"], row["completion"]
            if not (isinstance(prompt, str) and isinstance(completion, str)):
                raise TypeError
        except (ValueError, KeyError, TypeError):
            raise UsageError(
                f"{path}, line {number}: no example.",
                hint='Write {"prompt": "...", "completion": "..."}.',
                param="text",
            ) from None
        pairs.append((prompt, completion))
    return Examples(tuple(pairs))


def _why(error: OSError | UnicodeDecodeError) -> str:
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error.strerror)
