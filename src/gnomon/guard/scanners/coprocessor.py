"""Every token judged by a small model's hidden states and two heads (`gnomon guard train-coprocessor`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from gnomon.errors import ConfigError
from gnomon.guard.coprocessor import Heads, Reading
from gnomon.guard.scanning import Judgement, scanner

_lock = Lock()


@cache
def _model(reference: str) -> Any:
    from gnomon.loading import load

    return load(reference)


@cache
def _heads(path: str) -> Heads:
    return Heads.read(Path(path))


def loaded(*, heads: str = "", model: str = "", **others: Any) -> tuple[Heads, Any]:
    """The heads and the model that reads along. Raises ConfigError for heads that cannot be read."""
    if not heads:
        raise ConfigError(
            "`coprocessor` needs `heads`: a file made by gnomon guard train-coprocessor.", param="options.heads"
        )
    found = _heads(heads)
    with _lock:
        return found, _model(model or found.model)


def reading(*, heads: str = "", model: str = "", strict: bool = True) -> Reading:
    """Eyes for one text."""
    return Reading(*loaded(heads=heads, model=model), strict=strict)


@scanner(
    "coprocessor",
    about="Each token's risk by a small model with two `heads` (experimental).",
    opens=reading,
    needs=loaded,
)
def coprocessor(text: str, *, prompt: str = "", **options: Any) -> Judgement:
    return reading(**options)(text, prompt)
