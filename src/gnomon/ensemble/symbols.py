"""The virtual vocabulary of an ensemble, and its byte-view tokenizer.

A symbol is a byte string, or one of three signs: STOP (the one end that all members share), CHAT (a conversation
follows, as JSON) and GO (it is over). Everything above the engine (grammar, guard, stop strings, detokeniser) works
against this tokenizer as against any other. Knows nothing of networks or fusion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from gnomon.errors import PromptError
from gnomon.models.tokenizer import Tokenizer

SIGNS = (b"<|stop|>", b"<|chat|>", b"<|go|>")


class Symbols:
    """Byte strings in sorted order as ids 0..n-1, then STOP, CHAT and GO: the same ids in every process."""

    def __init__(self, strings: Iterable[bytes]) -> None:
        self.strings: list[bytes] = sorted(set(strings) - {b""})
        self.index: dict[bytes, int] = {string: place for place, string in enumerate(self.strings)}
        count = len(self.strings)
        self.stop, self.chat, self.go = count, count + 1, count + 2
        self.size = count + len(SIGNS)

    @classmethod
    def of_bytes(cls) -> Symbols:
        """The 256 bytes: symbol b is the byte b."""
        return cls(bytes([byte]) for byte in range(256))

    def bytes_of(self, symbol: int) -> bytes:
        """A symbol's bytes; a sign has its name."""
        if not 0 <= symbol < self.size:
            raise PromptError(f"Symbol {symbol} is outside the ensemble's vocabulary 0..{self.size - 1}.")
        return self.strings[symbol] if symbol < self.stop else SIGNS[symbol - self.stop]

    def of_byte(self, byte: int) -> int:
        """The symbol of a single byte. Raises PromptError where members have none in common."""
        if (found := self.index.get(bytes([byte]))) is None:
            raise PromptError(f"Not every member of the ensemble can say the byte 0x{byte:02x}.", param="prompt")
        return found

    def text(self, ids: Iterable[int]) -> bytes:
        """The joined bytes of the symbols that are no signs."""
        return b"".join(self.strings[i] for i in ids if i < self.stop)


class SymbolTokenizer(Tokenizer):
    """A `Tokenizer` over Symbols. split: plain text -> symbols (the primary member's own tokens, or single bytes)."""

    def __init__(self, symbols: Symbols, split: Callable[[str], list[int]], name: str) -> None:
        self.symbols = symbols
        self._split = split
        self._name = name
        self.bos_token_id = None
        self.eos_token_ids = frozenset({symbols.stop})
        self.special_ids = frozenset({symbols.stop, symbols.chat, symbols.go})
        self.add_bos = self.add_eos = False
        self.vocab_size = symbols.size
        self.strip_first_space = False

    def encode(self, text: str, *, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Text as symbols. Signs are never read from text; each member reads control tokens of a raw prompt itself."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(f"The text is not valid Unicode at character {error.start}.") from None
        return self._split(text)

    def token_bytes(self, token_id: int) -> bytes:
        return self.symbols.bytes_of(token_id)

    def ids_of_controls(self, texts: Sequence[str]) -> dict[str, int]:
        """None: no sign stands for a text."""
        return {}

    @property
    def sha256(self) -> str:
        """Names the vocabulary; how text is split changes no mask."""
        digest = hashlib.sha256(f"{self._name}\0{self.symbols.size}".encode())
        for string in self.symbols.strings:
            digest.update(len(string).to_bytes(4, "little") + string)
        return digest.hexdigest()


def split_by(tokens: Callable[[str], Sequence[bytes]], symbols: Symbols) -> Callable[[str], list[int]]:
    """A split by a member's own tokens, byte by byte where a token has no symbol."""

    def split(text: str) -> list[int]:
        found: list[int] = []
        for token in tokens(text):
            place = symbols.index.get(token)
            found += [place] if place is not None else [symbols.of_byte(byte) for byte in token]
        return found

    return split
