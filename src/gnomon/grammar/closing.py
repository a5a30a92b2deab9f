"""The shortest way to an end: from a state of the grammar to a complete text, searched byte by byte.

Two searches over the 256-byte vocabulary, where a step costs microseconds: a greedy one that closes whatever is open,
and a beam over distinguishable states, by length, that looks for something shorter. Both are bounded in states, so that
no grammar can hold them up. Knows bytes; turning them into tokens is the caller's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gnomon.grammar.matcher import Matcher
from gnomon.grammar.vocabulary import BYTE_END

GREEDY_STATES = 250
BEAM_STATES = 800
WIDTH = 12
"""States of one length that the beam follows."""
MOST_BYTES = 20_000
FEW = 24
"""Up to so many bytes that may come next are all tried; of more, a few letters stand for the rest."""
_CLOSE_FIRST = b'"'
_VALUE_FIRST = b'}],0123456789"[{ntf-'
_STRUCTURE = frozenset(b'"}]{[,:0123456789-.ntf\\')


class Checks(Protocol):
    """What stands behind the mask. A place is what was read so far, in whatever form the checks keep it."""

    def begin(self) -> Any:
        """The place before any text."""

    def read(self, place: Any, text: bytes) -> Any | None:
        """The place after all of `text`; None when this beginning is wrong."""

    def suggest(self, place: Any, text: bytes) -> Iterable[bytes]:
        """Texts worth trying next, the best first; they are judged like any other."""

    def may_end(self, place: Any, text: bytes) -> bool:
        """Whether the text, complete as far as the mask knows, is right as a whole."""


class NoChecks:
    """The mask says everything."""

    def begin(self) -> Any:
        return True

    def read(self, place: Any, text: bytes) -> Any | None:
        return place

    def suggest(self, place: Any, text: bytes) -> Iterable[bytes]:
        return ()

    def may_end(self, place: Any, text: bytes) -> bool:
        return True


@dataclass(slots=True)
class _State:
    matcher: Matcher
    text: bytes
    place: Any
    following: Iterator[bytes]
    looks: tuple[int, bytes, bool]


def complete(matcher: Matcher, before: bytes, checks: Checks, place: Any) -> tuple[bytes | None, int]:
    """(bytes that lead from here to a complete text, states visited); None when none was found within the bounds.

    matcher: over bytes, having read `before`; it is not changed. place: of the checks, after `before`.
    """
    return _greedy(matcher, before, checks, place)


def shortest(matcher: Matcher, checks: Checks) -> bytes | None:
    """A shortest complete text, as far as both searches see."""
    greedy, _ = _greedy(matcher, b"", checks, checks.begin())
    if greedy is not None and len(greedy) < 2:
        return greedy
    better = _beam(matcher, checks, len(greedy) if greedy is not None else MOST_BYTES)
    return better if better is not None else greedy


def _greedy(matcher: Matcher, before: bytes, checks: Checks, place: Any) -> tuple[bytes | None, int]:
    start = _state(matcher.copy(), before, checks, place)
    stack = [start] if start is not None else []
    for count in range(GREEDY_STATES):
        if not stack:
            return None, count
        state = stack[-1]
        if state.matcher.accepting and checks.may_end(state.place, state.text):
            return state.text[len(before) :], count
        piece = next(state.following, None)
        if piece is None:
            stack.pop()
        elif (following := _after(state, piece, checks)) is not None and len(following.text) < MOST_BYTES:
            stack.append(following)
    return None, GREEDY_STATES


def _beam(matcher: Matcher, checks: Checks, limit: int) -> bytes | None:
    """By length; of states that look alike at the same length one goes on, and at most WIDTH in all."""
    start = _state(matcher.copy(), b"", checks, checks.begin())
    if start is None:
        return None
    waiting: dict[int, list[_State]] = {len(start.text): [start]}
    seen = {start.looks}
    for _ in range(BEAM_STATES):
        if not waiting or (length := min(waiting)) >= limit:
            return None
        states = waiting[length]
        state = states.pop(0)
        if not states:
            del waiting[length]
        if state.matcher.accepting and checks.may_end(state.place, state.text):
            return state.text
        for piece in state.following:
            following = _after(state, piece, checks)
            if following is None or following.looks in seen:
                continue
            seen.add(following.looks)
            level = waiting.setdefault(len(following.text), [])
            if len(level) < WIDTH:
                level.append(following)
    return None


def _after(state: _State, piece: bytes, checks: Checks) -> _State | None:
    twin = state.matcher.copy()
    if twin.advance(list(piece)) != len(piece):
        return None
    return _state(twin, state.text + piece, checks, state.place)


def _state(matcher: Matcher, text: bytes, checks: Checks, place: Any) -> _State | None:
    """Follow what is forced, check it, then list what may come next, the most promising first."""
    while not matcher.accepting and (forced := matcher.forced_bytes()):
        if matcher.advance(list(forced)) != len(forced):
            break
        text += forced
    place = checks.read(place, text)
    if place is None:
        return None
    allowed_V = matcher.allowed()
    allowed = [byte for byte in np.flatnonzero(allowed_V).tolist() if byte != BYTE_END]
    looks = (len(text), allowed_V.tobytes(), matcher.accepting)
    return _State(matcher, text, place, _pieces(checks, place, text, allowed), looks)


def _pieces(checks: Checks, place: Any, text: bytes, allowed: list[int]) -> Iterator[bytes]:
    """What may come next, the most promising first."""
    yield from (piece for piece in checks.suggest(place, text) if piece)
    yield from (bytes([byte]) for byte in _ordered(allowed, text))


def _ordered(allowed: list[int], text: bytes) -> list[int]:
    """Closers first; inside a string its quote first; of many letters only a few."""
    preferred = _CLOSE_FIRST if _in_string(text) else _VALUE_FIRST
    here = set(allowed)
    first = [byte for byte in preferred if byte in here]
    rest = [byte for byte in allowed if byte not in preferred]
    if len(rest) > FEW:
        structure = [byte for byte in rest if byte in _STRUCTURE]
        letters = [byte for byte in rest if byte not in _STRUCTURE and byte > 0x20]
        rest = structure + letters[:: max(1, len(letters) // 6)]
    return first + rest


def _in_string(text: bytes) -> bool:
    """Whether JSON text ends inside a string."""
    inside, place = False, 0
    while place < len(text):
        byte = text[place]
        if byte == 0x5C and inside:
            place += 1
        elif byte == 0x22:
            inside = not inside
        place += 1
    return inside
