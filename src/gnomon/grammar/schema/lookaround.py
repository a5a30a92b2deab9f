"""ECMA patterns with look-around and word boundaries -> plain expressions, by intersection and complement.

`(?!A)B` is "B, and not A and anything"; `^` and `$` are look-arounds as well. What has no automaton that way (a
look-around inside a repetition, back-references) is left to the check afterwards. Knows patterns, not schemas.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from gnomon.grammar.schema.language import (
    ALL,
    ANY,
    EPSILON,
    NOTHING,
    Automaton,
    Ranges,
    Term,
    TooLarge,
    alt,
    automaton,
    both,
    cat,
    complement,
    expression,
    letters,
    negated,
    nullable,
    ranges,
    repeated,
)

WORD: Ranges = ((48, 57), (65, 90), (95, 95), (97, 122))
SPACE: Ranges = ranges(
    (point, point)
    for point in (
        *range(9, 14),
        32,
        160,
        0x1680,
        *range(0x2000, 0x200B),
        0x2028,
        0x2029,
        0x202F,
        0x205F,
        0x3000,
        0xFEFF,
    )
)
CLASSES = {"d": ((48, 57),), "w": WORD, "s": SPACE}
NEWLINES: Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}


class NotPlain(Exception):
    """No automaton this way."""


@dataclass(frozen=True)
class Look:
    """An assertion. behind: about what was read; of: None at the edge of the text (`^`, `$`)."""

    of: tuple[tuple[object, ...], ...] | None
    behind: bool
    negative: bool = False


@dataclass(frozen=True)
class Group:
    branches: tuple[tuple[object, ...], ...]


Items = Sequence[object]
"""Terms, Looks and (with Looks inside) Groups, one after the other."""


@lru_cache(maxsize=512)
def language(pattern: str, *, whole: bool = False, least: int = 0, most: int | None = None) -> Automaton | None:
    """The texts of `least` to `most` characters that match (whole: from end to end).

    None where there is no automaton within bounds."""
    try:
        branches = _Reader(pattern).all()
        around = EPSILON if whole else ALL
        matching = alt(*(_joined(around, branch, around) for branch in branches))
        long = ALL if (least, most) == (0, None) else repeated(ANY, least, most)
        return automaton(both(matching, long))
    except (NotPlain, TooLarge, RecursionError, IndexError, ValueError):
        return None


@lru_cache(maxsize=512)
def plain_expression(pattern: str, *, whole: bool = False) -> str | None:
    """An expression of the mask engine for the same texts, from end to end."""
    found = language(pattern, whole=whole)
    if found is None:
        return None
    try:
        return f"^(?:{expression(found)})$"
    except TooLarge:
        return None


def _joined(before: Term, items: Items, behind: Term, *, fresh: bool = True) -> Term:
    """Texts whose end is read by `items` and then `behind`, and whose beginning is `before`.

    fresh: `before` is everything that was read, so that any look behind can be decided.
    """
    left = before
    for place, item in enumerate(items):
        rest = items[place + 1 :]
        if isinstance(item, Look) and item.behind:
            left = _looked_behind(left, item, fresh)
        elif isinstance(item, Look):
            if item.of is None:
                wanted = EPSILON
            else:
                wanted = alt(*(_joined(EPSILON, branch, ALL, fresh=False) for branch in item.of))
            wanted = negated(wanted) if item.negative else wanted
            return cat(left, both(wanted, _joined(EPSILON, rest, behind, fresh=False)))
        elif isinstance(item, Group):
            return alt(*(_joined(left, [*branch, *rest], behind, fresh=fresh) for branch in item.branches))
        else:
            assert isinstance(item, tuple)
            left = cat(left, item)
    return cat(left, behind)


def _looked_behind(left: Term, look: Look, fresh: bool) -> Term:
    if look.of is None:
        if left == ALL and fresh:
            return EPSILON
        if fresh and nullable(left):
            return EPSILON
        return NOTHING if fresh and not nullable(left) else _refuse()
    inner = alt(*(_joined(EPSILON, branch, EPSILON, fresh=False) for branch in look.of))
    one_letter = inner[0] == "set"
    if not fresh and not (one_letter and not nullable(left)):
        _refuse()
    wanted = cat(ALL, inner)
    return both(left, negated(wanted) if look.negative else wanted)


def _refuse() -> Term:
    raise NotPlain


class _Reader:
    """Reads one pattern. Raises NotPlain for what it does not know."""

    def __init__(self, pattern: str) -> None:
        self.text = pattern
        self.place = 0

    def all(self) -> tuple[tuple[object, ...], ...]:
        found = self._branches()
        if self.place < len(self.text):
            raise NotPlain
        return found

    def _peek(self, mark: str) -> bool:
        return self.text.startswith(mark, self.place)

    def _take(self, mark: str) -> bool:
        if self._peek(mark):
            self.place += len(mark)
            return True
        return False

    def _branches(self) -> tuple[tuple[object, ...], ...]:
        found = [self._branch()]
        while self._take("|"):
            found.append(self._branch())
        return tuple(found)

    def _branch(self) -> tuple[object, ...]:
        items: list[object] = []
        while self.place < len(self.text) and not self._peek("|") and not self._peek(")"):
            item = self._atom()
            least, most = self._count()
            if (least, most) == (1, 1):
                items.append(item)
            elif isinstance(item, tuple):
                items.append(repeated(item, least, most))
            elif isinstance(item, Group) and (least, most) == (0, 1):
                items.append(Group((*item.branches, ())))
            else:
                raise NotPlain
        return tuple(items)

    def _atom(self) -> object:
        if self._take("^"):
            return Look(None, behind=True)
        if self._take("$"):
            return Look(None, behind=False)
        for mark, behind, negative in (("(?=", 0, 0), ("(?!", 0, 1), ("(?<=", 1, 0), ("(?<!", 1, 1)):
            if self._take(mark):
                return Look(self._closed(), behind=bool(behind), negative=bool(negative))
        if self._take("("):
            if self._take("?:") or not self._peek("?"):
                return _grouped(self._closed())
            if self._take("?<"):
                self.place = self.text.index(">", self.place) + 1
                return _grouped(self._closed())
            raise NotPlain
        if self._take("["):
            return letters(self._class())
        if self._take("."):
            return letters(complement(NEWLINES))
        if self._take("\\"):
            return self._escape()
        letter = self.text[self.place]
        if letter in "*+?{})":
            raise NotPlain
        self.place += 1
        return _letter(ord(letter))

    def _closed(self) -> tuple[tuple[object, ...], ...]:
        found = self._branches()
        if not self._take(")"):
            raise NotPlain
        return found

    def _count(self) -> tuple[int, int | None]:
        least, most = 1, 1
        bounds: tuple[int, int | None] = (least, most)
        if self._take("*"):
            bounds = (0, None)
        elif self._take("+"):
            bounds = (1, None)
        elif self._take("?"):
            bounds = (0, 1)
        elif self._take("{"):
            end = self.text.index("}", self.place)
            low, comma, high = self.text[self.place : end].partition(",")
            bounds = (int(low), (int(high) if high else None) if comma else int(low))
            self.place = end + 1
        else:
            return bounds
        self._take("?")  # whether it is lazy changes no language
        return bounds

    def _escape(self) -> object:
        letter = self.text[self.place]
        if letter in "bB":
            self.place += 1
            word = ((letters(WORD),),)
            edges = [
                (Look(word, behind=True, negative=first), Look(word, behind=False, negative=first ^ (letter == "b")))
                for first in (False, True)
            ]
            return Group(tuple(edges))
        return letters(self._points())

    def _points(self) -> Ranges:
        """What the escape at this place stands for."""
        letter = self.text[self.place]
        self.place += 1
        if letter.lower() in CLASSES:
            found = CLASSES[letter.lower()]
            return found if letter.islower() else complement(found)
        if letter in "pP":
            end = self.text.index("}", self.place)
            found = _category(self.text[self.place + 1 : end].split("=")[-1])
            self.place = end + 1
            return found if letter == "p" else complement(found)
        point = self._point(letter)
        return ((point, point),)

    def _point(self, letter: str) -> int:
        if letter in CONTROLS and not (letter == "0" and self.text[self.place : self.place + 1].isdigit()):
            return CONTROLS[letter]
        if letter == "u" and self._take("{"):
            end = self.text.index("}", self.place)
            digits, self.place = self.text[self.place : end], end + 1
            return int(digits, 16)
        if letter in "ux":
            size = 4 if letter == "u" else 2
            digits = self.text[self.place : self.place + size]
            self.place += size
            point = int(digits, 16)
            if 0xD800 <= point <= 0xDFFF:
                raise NotPlain
            return point
        if letter == "c":
            self.place += 1
            return ord(self.text[self.place - 1].upper()) - 64
        if letter.isalnum():
            raise NotPlain  # a back-reference, or nobody knows what
        return ord(letter)

    def _class(self) -> Ranges:
        negative = self._take("^")
        pairs: list[tuple[int, int]] = []
        while not self._take("]"):
            low = self._member()
            if len(low) == 1 and low[0][0] == low[0][1] and self._peek("-") and not self._peek("-]"):
                self.place += 1
                high = self._member()
                if len(high) != 1 or high[0][0] != high[0][1]:
                    raise NotPlain
                pairs.append((low[0][0], high[0][1]))
            else:
                pairs += low
        return complement(ranges(pairs)) if negative else ranges(pairs)

    def _member(self) -> Ranges:
        if self._take("\\"):
            if self._take("b"):
                return ((8, 8),)
            if self._take("-"):
                return ((45, 45),)
            return self._points()
        point = ord(self.text[self.place])
        self.place += 1
        return ((point, point),)


def _letter(point: int) -> Term:
    return letters(((point, point),))


def _grouped(branches: tuple[tuple[object, ...], ...]) -> object:
    """A group as one term when nothing in it looks around."""
    if any(not isinstance(item, tuple) for branch in branches for item in branch):
        return Group(branches)
    made = []
    for branch in branches:
        term = EPSILON
        for item in reversed(branch):
            assert isinstance(item, tuple)
            term = cat(item, term)
        made.append(term)
    return alt(*made)


@lru_cache(maxsize=32)
def _category(name: str) -> Ranges:
    """A general category of Unicode, by its short name (L, Lu, Nd, ...)."""
    if len(name) > 2 or not name.isalpha():
        raise NotPlain
    found = [(point, point) for point in range(0x110000) if unicodedata.category(chr(point)).startswith(name)]
    if not found:
        raise NotPlain
    return ranges(found)
