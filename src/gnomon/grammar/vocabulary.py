"""The vocabulary as the mask engine wants it: every token's bytes, the end tokens, and our encoder.

Two kinds: a model's own tokenizer, and plain bytes (one token a byte), over which texts are judged without a model.
Knows nothing of grammars.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
from llguidance import LLTokenizer, TokenizerWrapper
from numpy.typing import NDArray

from gnomon.errors import UnsupportedModel
from gnomon.models.tokenizer import Tokenizer

BYTE_END = 256
"""The end token of the byte vocabulary."""
KEPT = 4
"""Vocabularies held at once: a server has few models."""


class Vocabulary:
    """One vocabulary. size: rows of logits; writable_V: tokens that stand for text, or end it; shown: control tokens
    that stand for their text."""

    def __init__(
        self,
        engine: LLTokenizer,
        size: int,
        ends: tuple[int, ...],
        writable_V: NDArray[np.bool_],
        shown: frozenset[int] = frozenset(),
    ) -> None:
        self.shown = shown
        self.engine = engine
        self.size = size
        self.ends = ends
        self.writable_V = writable_V


class _Source:
    """What llguidance's wrapper reads of a tokenizer."""

    def __init__(self, tokens: list[bytes], special: list[int], end: int, encode: Any) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = end
        self.bos_token_id = None
        self._encode = encode

    def __call__(self, text: bytes | str) -> list[int]:
        encoded: list[int] = self._encode(text)
        return encoded


@cache
def byte_vocabulary() -> Vocabulary:
    """256 bytes and an end."""

    def encode(text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)

    source = _Source([bytes([i]) for i in range(256)] + [b"<end>"], [BYTE_END], BYTE_END, encode)
    engine = LLTokenizer(TokenizerWrapper(source), n_vocab=257, eos_token=BYTE_END, slices=[])
    return Vocabulary(engine, 257, (BYTE_END,), np.ones(257, dtype=np.bool_))


_LOCK = threading.Lock()
_KNOWN: dict[str, Vocabulary] = {}


def vocabulary_of(tokenizer: Tokenizer, controls: tuple[str, ...] = ()) -> Vocabulary:
    """The vocabulary of a model's tokenizer; built once (some tenths of a second), kept by the tokenizer's hash.

    controls: control tokens that stand for their text here, where the tokenizer has them.
    """
    shown = tokenizer.ids_of_controls(controls)
    key = f"{tokenizer.sha256}/{tokenizer.vocab_size}/{sorted(shown.items())}"
    with _LOCK:
        if key not in _KNOWN:
            while len(_KNOWN) >= KEPT:
                _KNOWN.pop(next(iter(_KNOWN)))
            _KNOWN[key] = _build(tokenizer, shown)
        return _KNOWN[key]


def encoded(tokenizer: Tokenizer, text: str, shown: Mapping[str, int]) -> list[int]:
    """Plain text as tokens, but for the control tokens that are shown."""
    for control, token in shown.items():
        before, found, after = text.partition(control)
        if found:
            return [*encoded(tokenizer, before, shown), token, *encoded(tokenizer, after, shown)]
    return tokenizer.encode(text, add_special_tokens=False, parse_special=False) if text else []


def _build(tokenizer: Tokenizer, shown: Mapping[str, int]) -> Vocabulary:
    ends = tuple(sorted(tokenizer.eos_token_ids))
    if not ends:
        raise UnsupportedModel("This model's tokenizer names no end-of-text token, so a grammar could never end.")
    tokens = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    special = sorted((tokenizer.special_ids - set(shown.values())) | tokenizer.eos_token_ids)

    def encode(text: bytes | str) -> list[int]:
        plain = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        return encoded(tokenizer, plain, shown)

    source = _Source(tokens, special, ends[0], encode)
    engine = LLTokenizer(TokenizerWrapper(source), n_vocab=tokenizer.vocab_size, eos_token=list(ends))
    writable_V = np.array([bool(text) for text in tokens])
    writable_V[special] = False  # control tokens are no text, whatever their spelling
    writable_V[list(ends)] = True
    return Vocabulary(engine, tokenizer.vocab_size, ends, writable_V, frozenset(shown.values()))
