"""Incremental re-tokenisation: bytes that grow (or shrink), as one member's own token ids.

The ids are always those of tokenising the whole text at once. What lies before a hard boundary (a letter, a space, a
letter, where no token of the vocabulary spans it) is tokenised once and kept. Bytes that are no UTF-8, or not yet,
become byte tokens. Knows one tokenizer, nothing of networks.
"""

from __future__ import annotations

import re

from gnomon.errors import UnsupportedModel
from gnomon.models.tokenizer import Tokenizer

KEEP = 96
"""Bytes at the end that are tokenised anew each time."""
BOUNDARY = re.compile(rb"(?<=[A-Za-z])(?= [A-Za-z])")
SENTINEL = "\n"
"""Stands before a text for tokenizers that put a space before everything; its tokens are taken away again."""


class Retokenizer:
    """What all texts of one member share."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.texts = [
            tokenizer.token_bytes(i) if not tokenizer.is_special(i) else b"" for i in range(tokenizer.vocab_size)
        ]
        self.byte_tokens: dict[int, int] = {}
        for index, text in enumerate(self.texts):
            if len(text) == 1:
                self.byte_tokens.setdefault(text[0], index)
        crossing = re.compile(rb"[A-Za-z] [A-Za-z]")
        self.has_boundaries = not any(crossing.search(text) for text in self.texts if b" " in text[1:])
        self._sentinel = self._plain(SENTINEL) if tokenizer.strip_first_space else []

    def ids(self, data: bytes) -> list[int]:
        """Token ids of a text that continues another one: no BOS, no dummy space; names of control tokens are text."""
        ids: list[int] = []
        for piece, valid in utf8_runs(data):
            ids += self._encode(piece.decode("utf-8")) if valid else [self.byte_token(byte) for byte in piece]
        return ids

    def byte_token(self, byte: int) -> int:
        if byte not in self.byte_tokens:
            raise UnsupportedModel(f"A member's vocabulary has no token for the byte 0x{byte:02x}.")
        return self.byte_tokens[byte]

    def _plain(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False, parse_special=False)

    def _encode(self, text: str) -> list[int]:
        if not self._sentinel:
            return self._plain(text)
        ids = self._plain(SENTINEL + text)
        return ids[len(self._sentinel) :] if ids[: len(self._sentinel)] == self._sentinel else self._plain(text)


class GrowingText:
    """One text of one member. `update` gives the ids of the whole text."""

    def __init__(self, retokenizer: Retokenizer) -> None:
        self.retokenizer = retokenizer
        self.data = b""
        self.head = 0
        self.head_ids: list[int] = []
        self.ids: list[int] = []

    def update(self, data: bytes) -> list[int]:
        """The token ids of `data`, which usually is the last text plus a few bytes."""
        if data == self.data and self.ids:
            return self.ids
        if len(data) < self.head or data[: self.head] != self.data[: self.head]:
            self.head, self.head_ids = 0, []
        self.data = data
        if self.retokenizer.has_boundaries and len(data) - self.head > 3 * KEEP:
            self._advance_head()
        self.ids = self.head_ids + self.retokenizer.ids(data[self.head :])
        return self.ids

    def _advance_head(self) -> None:
        last: re.Match[bytes] | None = None
        for last in BOUNDARY.finditer(self.data, self.head, len(self.data) - KEEP):  # noqa: B007
            pass
        if last is not None:
            self.head_ids = self.head_ids + self.retokenizer.ids(self.data[self.head : last.start()])
            self.head = last.start()


def utf8_runs(data: bytes) -> list[tuple[bytes, bool]]:
    """A text in pieces that are valid UTF-8 (True) or not, or not yet, (False)."""
    runs: list[tuple[bytes, bool]] = []
    start = 0
    while start < len(data):
        try:
            data[start:].decode("utf-8")
            runs.append((data[start:], True))
            break
        except UnicodeDecodeError as error:
            if error.start:
                runs.append((data[start : start + error.start], True))
            runs.append((data[start + error.start : start + error.end], False))
            start += error.end
    return runs
