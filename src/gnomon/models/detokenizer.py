"""Incremental detokenisation: token ids in, complete characters out, never a broken UTF-8 sequence.

The joined output equals decoding all bytes at once with U+FFFD for broken ones, for every list of ids. Its whole state
is a few bytes, so that it can be copied and rolled back.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Set
from typing import Any


class IncrementalDetokenizer:
    """One text being decoded. Special ids give no text."""

    def __init__(self, token_bytes: Callable[[int], bytes], skip: Set[int], *, strip_first_space: bool = False) -> None:
        self._token_bytes = token_bytes
        self._skip = skip
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._strip = strip_first_space

    def push(self, token_id: int) -> str:
        """The characters that this token completes; "" while a sequence is open."""
        if token_id in self._skip:
            return ""
        raw = self._token_bytes(token_id)
        if self._strip and raw:
            raw = raw.removeprefix(b" ")
            self._strip = False
        return self._decoder.decode(raw)

    def finish(self) -> str:
        """The end: U+FFFD for a sequence that stayed open."""
        return self._decoder.decode(b"", final=True)

    def snapshot(self) -> tuple[Any, bool]:
        """The state, for restore()."""
        return self._decoder.getstate(), self._strip

    def restore(self, state: tuple[Any, bool]) -> None:
        """Go back to a snapshot."""
        decoder, self._strip = state
        self._decoder.setstate(decoder)

    def copy(self) -> IncrementalDetokenizer:
        twin = IncrementalDetokenizer(self._token_bytes, self._skip)
        twin.restore(self.snapshot())
        return twin
