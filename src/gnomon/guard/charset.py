"""Sets of characters as sorted, disjoint code-point intervals. Pure values; knows nothing of patterns or texts."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache

LAST = 0x10FFFF
Interval = tuple[int, int]  # both ends included
CharSet = tuple[Interval, ...]


def charset(intervals: Iterable[Interval]) -> CharSet:
    """Sorted and merged."""
    merged: list[Interval] = []
    for low, high in sorted(intervals):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def of(characters: str) -> CharSet:
    return charset((ord(c), ord(c)) for c in characters)


def union(*sets: CharSet) -> CharSet:
    return charset(interval for one in sets for interval in one)


def complement(one: CharSet) -> CharSet:
    rest: list[Interval] = []
    at = 0
    for low, high in one:
        if low > at:
            rest.append((at, low - 1))
        at = high + 1
    if at <= LAST:
        rest.append((at, LAST))
    return tuple(rest)


def contains(one: CharSet, code: int) -> bool:
    return any(low <= code <= high for low, high in one)


@cache
def fold(one: CharSet) -> CharSet:
    """With the other case of every letter (simple, one-to-one pairs; scripts that have cases lie below U+3000)."""
    more: list[Interval] = list(one)
    for low, high in one:
        for code in range(low, min(high, 0x2FFF) + 1):
            character = chr(code)
            for other in (character.lower(), character.upper()):
                if len(other) == 1 and other != character:
                    more.append((ord(other), ord(other)))
    return charset(more)


DIGIT = of("0123456789")
WORD = charset([(48, 57), (65, 90), (95, 95), (97, 122)])
SPACE = of("\t\n\f\r ")
ANY: CharSet = ((0, LAST),)
NEWLINE = of("\n")
POSIX = {
    "alnum": charset([(48, 57), (65, 90), (97, 122)]),
    "alpha": charset([(65, 90), (97, 122)]),
    "ascii": ((0, 127),),
    "blank": of(" \t"),
    "cntrl": charset([(0, 31), (127, 127)]),
    "digit": DIGIT,
    "graph": ((33, 126),),
    "lower": ((97, 122),),
    "print": ((32, 126),),
    "punct": charset([(33, 47), (58, 64), (91, 96), (123, 126)]),
    "space": of("\t\n\v\f\r "),
    "upper": ((65, 90),),
    "word": WORD,
    "xdigit": charset([(48, 57), (65, 70), (97, 102)]),
}
