"""Sentence vectors for scanners, from a small encoder (zoo: minilm-l6-v2), loaded once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from threading import Lock
from typing import Any

import numpy as np

DEFAULT = "minilm-l6-v2"
_lock = Lock()


@cache
def _encoder(reference: str) -> Any:
    from gnomon.loading import load

    return load(reference)


def encoder(*, model: str = DEFAULT, **others: Any) -> None:
    """What a scanner on sentence vectors needs."""
    vectors(["a"], model)


def vectors(texts: Sequence[str], model: str = DEFAULT) -> np.ndarray:
    """-> [n, C] float32, of length one. A text's vector is the same alone or among others."""
    with _lock:
        encoder = _encoder(model)
        return np.asarray(encoder.embed([text[:4000] or " " for text in texts]).numpy(), dtype=np.float32)
