"""Views of the text for matching only: what is seen when disguises are taken off. The text itself is never changed.

A view turns characters into other characters, each with the place in the text that it came from, so that findings
map back. It works character by character and says from where on its own output is undecided (`pending`), so results
never depend on how the text was split. Knows nothing of rules.
"""

from __future__ import annotations

import codecs
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

Piece = tuple[str, int, int]  # a character of the view, and the [start, end) of the text that it came from


class View(Protocol):
    """One text's view. push gives the characters that are decided now; pending: undecided text begins here, or None."""

    def push(self, character: str, place: int) -> list[Piece]: ...
    def finish(self) -> list[Piece]: ...
    @property
    def pending(self) -> int | None: ...
    def state(self) -> Any: ...
    def restore(self, saved: Any) -> None: ...


class Mapped:
    """A view in which every character stands for itself, for others or for none."""

    pending = None

    def __init__(self, table: Callable[[str], str]) -> None:
        self.table = table

    def push(self, character: str, place: int) -> list[Piece]:
        return [(one, place, place + 1) for one in self.table(character)]

    def finish(self) -> list[Piece]:
        return []

    def state(self) -> Any:
        return None

    def restore(self, saved: Any) -> None:
        """There is nothing to restore."""


LOOKALIKES = {
    "a": "аɑαΑАꓮ", "b": "ΒВЬ", "c": "сϲСϹ", "d": "ԁⅾ", "e": "еЕΕєҽ", "g": "ɡց", "h": "һНΗհ", "i": "іІΙιıӏ", "j": "јЈϳ",
    "k": "кКΚκ", "l": "ⅼ∣ⲓ", "m": "мМΜ", "n": "Νոп", "o": "оОοΟօσ", "p": "рРρΡ", "q": "ԛգ", "r": "гᴦ", "s": "ѕЅ",
    "t": "тТΤτ", "u": "υսᴜ", "v": "νѵᴠ", "w": "ԝωᴡ", "x": "хХχΧ", "y": "уУүΥγ", "z": "Ζᴢ",
}  # fmt: skip
"""Letters of other scripts that look like Latin ones (chosen by us; UTS 39 lists many more)."""
CONFUSABLE = {other: latin for latin, others in LOOKALIKES.items() for other in others}
LEET = dict(zip("013456789@$!|+", "oieasgtbgasilt", strict=True))


@lru_cache(maxsize=100_000)
def folded(character: str) -> str:
    """NFKD, without marks and invisible characters, caseless, look-alikes as Latin letters."""
    plain = []
    for one in unicodedata.normalize("NFKD", character):
        if unicodedata.category(one) in ("Mn", "Me", "Cf", "Cn") or "\U000e0000" <= one <= "\U000e007f":
            continue
        plain.append("".join(CONFUSABLE.get(c, c) for c in CONFUSABLE.get(one, one).casefold()))
    return "".join(plain)


@lru_cache(maxsize=100_000)
def leet(character: str) -> str:
    """Folded, and digits and signs as the letters they stand for."""
    return "".join(LEET.get(one, one) for one in folded(character))


def as_seen(words: list[str], views: list[str]) -> list[str]:
    """Words as these views show them too: without accents, for one, where the view takes them off the text."""
    names = "+".join(views)
    seen = list(words)
    if "nfkc" in names:
        seen += ["".join(map(folded, word)) for word in words]
    if "leet" in names or "spaced" in names:
        seen += ["".join(map(leet, word)) for word in words]
    return list(dict.fromkeys(seen))


def visible(character: str) -> str:
    """Without zero-width and other format characters."""
    return "" if unicodedata.category(character) == "Cf" else character


def rot13(character: str) -> str:
    return codecs.encode(character, "rot13")


class Spaced:
    """Letters that stand alone between separators (`s p a c e d`) run together; whole words are a break."""

    SEPARATORS = " .-_*/\t|,"

    def __init__(self) -> None:
        self.before = True  # a separator, or the text's begin, stands before
        self.waiting: tuple[str, int] | None = None

    @property
    def pending(self) -> int | None:
        return self.waiting[1] if self.waiting else None

    def push(self, character: str, place: int) -> list[Piece]:
        if character in self.SEPARATORS:
            out, self.waiting, self.before = self.finish(), None, True
            return out
        alone, self.before = self.before, False
        if alone:
            self.waiting = (character, place)
            return []
        broken, self.waiting = self.waiting, None
        return [("\0", broken[1] if broken else place, place + 1)]

    def finish(self) -> list[Piece]:
        return [(c, self.waiting[1], self.waiting[1] + 1) for c in leet(self.waiting[0])] if self.waiting else []

    def state(self) -> Any:
        return [self.before, self.waiting]

    def restore(self, saved: Any) -> None:
        self.before, self.waiting = saved[0], tuple(saved[1]) if saved[1] else None


class Decoded:
    """Runs of base64, hexadecimal or URL escapes, decoded as they come; other text is a break.

    Base64 and hexadecimal are read from the begin of each run. One more layer inside is seen by stacking views.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.group: list[tuple[int, int]] = []  # (value of the digit, place)
        self.escape = ""
        self.escape_at = 0

    @property
    def pending(self) -> int | None:
        if self.escape:
            return self.escape_at
        return self.group[0][1] if self.group else None

    def push(self, character: str, place: int) -> list[Piece]:
        if self.kind == "url":
            return self._url(character, place)
        value = _digit(self.kind, character)
        if value is None:
            self.group = []
            return [("\0", place, place + 1)]
        self.group.append((value, place))
        return self._hex() if self.kind == "hex" else self._base64()

    def _hex(self) -> list[Piece]:
        if len(self.group) < 2:
            return []
        (high, start), (low, end) = self.group
        self.group = []
        return [(chr(high * 16 + low), start, end + 1)]

    def _base64(self) -> list[Piece]:
        count = len(self.group)
        if count == 1:
            return []
        (first, start), (second, end) = self.group[-2:]
        shift = {2: 4, 3: 2, 4: 0}[count]
        byte = (first << (6 - shift) | second >> shift) & 255
        if count == 4:
            self.group = []
        return [(chr(byte), start, end + 1)]

    def _url(self, character: str, place: int) -> list[Piece]:
        if self.escape or character == "%":
            if not self.escape:
                self.escape_at = place
            self.escape += character
            if len(self.escape) < 3 and (self.escape == "%" or character in "0123456789abcdefABCDEF"):
                return []
            text, self.escape = self.escape, ""
            plain = unquote_to_bytes(text).decode("latin-1") if len(text) == 3 else text
            if len(plain) == 1:
                return [(plain, self.escape_at, place + 1)]
            return [(one, self.escape_at + i, self.escape_at + i + 1) for i, one in enumerate(text)]
        return [(character, place, place + 1)]

    def finish(self) -> list[Piece]:
        return [(one, self.escape_at + i, self.escape_at + i + 1) for i, one in enumerate(self.escape)]

    def state(self) -> Any:
        return [self.group, self.escape, self.escape_at]

    def restore(self, saved: Any) -> None:
        self.group = [(value, place) for value, place in saved[0]]
        self.escape, self.escape_at = saved[1], saved[2]


def _digit(kind: str, character: str) -> int | None:
    if kind == "hex":
        return int(character, 16) if character in "0123456789abcdefABCDEF" else None
    place = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/-_".find(character)
    return None if place < 0 else place if place < 64 else place - 2


class Stacked:
    """One view over another: `base64+base64`, `url+nfkc`."""

    def __init__(self, inner: View, outer: View) -> None:
        self.inner, self.outer = inner, outer
        self.spans: list[tuple[int, int]] = []  # of the inner view's characters that the outer has not given out
        self.count = 0

    @property
    def pending(self) -> int | None:
        inside = None if self.outer.pending is None else self.spans[self.outer.pending - self.count][0]
        places = [place for place in (inside, self.inner.pending) if place is not None]
        return min(places, default=None)

    def push(self, character: str, place: int) -> list[Piece]:
        return self._through(self.inner.push(character, place))

    def _through(self, pieces: list[Piece]) -> list[Piece]:
        out = []
        for one, start, end in pieces:
            self.spans.append((start, end))
            number = self.count + len(self.spans) - 1
            for found, a, b in self.outer.push(one, number):
                out.append((found, self.spans[a - self.count][0], self.spans[b - 1 - self.count][1]))
            keep = self.outer.pending if self.outer.pending is not None else number + 1
            keep = min(keep, number - 3) if len(self.spans) > 4 else self.count
            del self.spans[: max(keep - self.count, 0)]
            self.count = max(keep, self.count)
        return out

    def finish(self) -> list[Piece]:
        out = self._through(self.inner.finish())
        for found, a, b in self.outer.finish():
            out.append((found, self.spans[a - self.count][0], self.spans[b - 1 - self.count][1]))
        return out

    def state(self) -> Any:
        return [self.inner.state(), self.outer.state(), self.spans, self.count]

    def restore(self, saved: Any) -> None:
        self.inner.restore(saved[0])
        self.outer.restore(saved[1])
        self.spans, self.count = [(a, b) for a, b in saved[2]], saved[3]


VIEWS: dict[str, Callable[[], View]] = {
    "nfkc": lambda: Mapped(folded),
    "leet": lambda: Mapped(leet),
    "visible": lambda: Mapped(visible),
    "rot13": lambda: Mapped(rot13),
    "spaced": Spaced,
    "base64": lambda: Decoded("base64"),
    "hex": lambda: Decoded("hex"),
    "url": lambda: Decoded("url"),
    "base64+base64": lambda: Stacked(Decoded("base64"), Decoded("base64")),
    "url+nfkc": lambda: Stacked(Decoded("url"), Mapped(folded)),
    "base64+nfkc": lambda: Stacked(Decoded("base64"), Mapped(folded)),
}
"""By name; `raw` is the text itself."""
VIEW_NAMES = ("raw", *VIEWS)
