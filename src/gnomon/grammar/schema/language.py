"""Languages as terms with intersection and complement; their automata by derivatives; and back to a plain expression.

After Brzozowski, "Derivatives of regular expressions" (1964): the state of the automaton is the term itself. Knows code
points, nothing of JSON or of any notation for patterns but the engine's, which it writes. A term is a tuple:
("set", ranges) | ("cat", a, b) | ("alt", terms) | ("and", terms) | ("not", a) | ("star", a); EPSILON; NOTHING.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

Term = tuple[Any, ...]
Ranges = tuple[tuple[int, int], ...]
"""Code points, sorted, disjoint, ends included."""
MOST_STATES = 400
MOST_LETTERS = 40
MOST_TEXT = 20_000
MOST_WEIGHT = 20_000
"""Parts of one term: repetitions in repetitions multiply."""
MOST_WORK = 1_000_000
"""Parts of all states of one automaton together."""
EPSILON: Term = ("eps",)
NOTHING: Term = ("set", ())
SCALARS: Ranges = ((0, 0xD7FF), (0xE000, 0x10FFFF))


class TooLarge(Exception):
    """The language has no automaton or expression within the bounds."""


# -- sets of code points ------------------------------------------------------------------------------------------


def ranges(pairs: Iterable[tuple[int, int]]) -> Ranges:
    made: list[tuple[int, int]] = []
    for low, high in sorted(pair for pair in pairs if pair[0] <= pair[1]):
        if made and low <= made[-1][1] + 1:
            made[-1] = (made[-1][0], max(made[-1][1], high))
        else:
            made.append((low, high))
    return tuple(made)


def complement(of: Ranges) -> Ranges:
    """Within the Unicode scalar values."""
    made, start = [], 0
    for low, high in of:
        made.append((start, low - 1))
        start = high + 1
    made.append((start, 0x10FFFF))
    scalars = []
    for low, high in made:
        scalars += [(low, min(high, 0xD7FF)), (max(low, 0xE000), high)]
    return ranges(scalars)


# -- terms --------------------------------------------------------------------------------------------------------


def letters(of: Ranges) -> Term:
    return ("set", of)


ANY = letters(SCALARS)
ALL: Term = ("star", ANY)


def cat(first: Term, second: Term) -> Term:
    if NOTHING in (first, second):
        return NOTHING
    if first == EPSILON:
        return second
    if second == EPSILON:
        return first
    if first[0] == "cat":
        return ("cat", first[1], cat(first[2], second))
    return ("cat", first, second)


def alt(*terms: Term) -> Term:
    found: set[Term] = set()
    for term in terms:
        found |= term[1] if term[0] == "alt" else {term}
    found.discard(NOTHING)
    if ALL in found:
        return ALL
    if len(found) < 2:
        return next(iter(found), NOTHING)
    return ("alt", frozenset(found))


def both(*terms: Term) -> Term:
    found: set[Term] = set()
    for term in terms:
        found |= term[1] if term[0] == "and" else {term}
    found.discard(ALL)
    if NOTHING in found:
        return NOTHING
    if len(found) < 2:
        return next(iter(found), ALL)
    return ("and", frozenset(found))


def negated(term: Term) -> Term:
    if term[0] == "not":
        inner: Term = term[1]
        return inner
    if term == NOTHING:
        return ALL
    return NOTHING if term == ALL else ("not", term)


def star(term: Term) -> Term:
    if term in (NOTHING, EPSILON):
        return EPSILON
    return term if term[0] == "star" else ("star", term)


def repeated(term: Term, least: int, most: int | None) -> Term:
    """term{least,most}; most None: without end. Raises TooLarge."""
    times = max(least, most or 0)
    if times > MOST_STATES or times * weight(term) > MOST_WEIGHT:
        raise TooLarge
    made = star(term) if most is None else EPSILON
    for _ in range((most or least) - least):
        made = alt(EPSILON, cat(term, made))
    for _ in range(least):
        made = cat(term, made)
    return made


@lru_cache(maxsize=50_000)
def weight(term: Term) -> int:
    """How many parts a term has."""
    kind = term[0]
    if kind in ("eps", "set"):
        return 1
    return 1 + sum(map(weight, term[1] if kind in ("alt", "and") else term[1:]))


@lru_cache(maxsize=50_000)
def nullable(term: Term) -> bool:
    """Whether the empty text belongs to it."""
    kind = term[0]
    if kind in ("eps", "star"):
        return True
    if kind == "set":
        return False
    if kind == "cat":
        return nullable(term[1]) and nullable(term[2])
    if kind == "not":
        return not nullable(term[1])
    return any(map(nullable, term[1])) if kind == "alt" else all(map(nullable, term[1]))


@lru_cache(maxsize=200_000)
def after(term: Term, point: int) -> Term:
    """The derivative: what may follow once this code point was read."""
    kind = term[0]
    if kind == "eps":
        return NOTHING
    if kind == "set":
        return EPSILON if any(low <= point <= high for low, high in term[1]) else NOTHING
    if kind == "cat":
        first = cat(after(term[1], point), term[2])
        return alt(first, after(term[2], point)) if nullable(term[1]) else first
    if kind == "star":
        return cat(after(term[1], point), term)
    if kind == "not":
        return negated(after(term[1], point))
    parts = [after(part, point) for part in term[1]]
    return alt(*parts) if kind == "alt" else both(*parts)


# -- automata -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Automaton:
    """Deterministic, without states that lead nowhere; state 0 is the start. An empty language has no state."""

    steps: tuple[Mapping[int, Ranges], ...]
    """State -> following state -> by which code points."""
    ends: frozenset[int]


def automaton(term: Term) -> Automaton:
    """Raises TooLarge."""
    alphabet = _classes(term)
    numbers, order, steps = {term: 0}, [term], list[dict[int, list[tuple[int, int]]]]()
    work = 0
    for state in order:
        row: dict[int, list[tuple[int, int]]] = {}
        for points in alphabet:
            following = after(state, points[0][0])
            if following == NOTHING:
                continue
            if following not in numbers:
                work += weight(following)
                if len(order) >= MOST_STATES or work > MOST_WORK:
                    raise TooLarge
                numbers[following] = len(order)
                order.append(following)
            row.setdefault(numbers[following], []).extend(points)
        steps.append(row)
    ends = {numbers[state] for state in order if nullable(state)}
    return _trimmed(*_merged([{to: ranges(points) for to, points in row.items()} for row in steps], ends))


def _classes(term: Term) -> list[Ranges]:
    """The alphabet in as few parts as the term can tell apart."""
    sets: set[Ranges] = set()
    stack, seen = [term], set[Term]()
    while stack:
        part = stack.pop()
        if part in seen:
            continue
        seen.add(part)
        if part[0] == "set":
            sets.add(part[1])
        elif part[0] in ("alt", "and"):
            stack += part[1]
        else:
            stack += part[1:]
    cuts = sorted({0, 0xD800, 0xE000, 0x110000} | {cut for one in sets for low, high in one for cut in (low, high + 1)})
    classes: dict[frozenset[Ranges], list[tuple[int, int]]] = {}
    for low, following in pairwise(cuts):
        if low != 0xD800:
            within = frozenset(one for one in sets if any(a <= low <= b for a, b in one))
            classes.setdefault(within, []).append((low, following - 1))
    if len(classes) > MOST_LETTERS:
        raise TooLarge
    return [ranges(pairs) for pairs in classes.values()]


def _merged(steps: list[dict[int, Ranges]], ends: set[int]) -> tuple[list[dict[int, Ranges]], set[int]]:
    """States that no text tells apart become one (Moore)."""
    block = [int(state in ends) for state in range(len(steps))]
    while True:
        looks: dict[Any, int] = {}
        following = []
        for state, row in enumerate(steps):
            by_block: dict[int, list[tuple[int, int]]] = {}
            for to, points in row.items():
                by_block.setdefault(block[to], []).extend(points)
            look = (block[state], frozenset((to, ranges(points)) for to, points in by_block.items()))
            following.append(looks.setdefault(look, len(looks)))
        if len(set(following)) == len(set(block)):
            break
        block = following
    made: list[dict[int, Ranges]] = [{} for _ in range(max(following) + 1)]
    for state, row in enumerate(steps):
        joined: dict[int, list[tuple[int, int]]] = {}
        for to, points in row.items():
            joined.setdefault(following[to], []).extend(points)
        made[following[state]] = {to: ranges(points) for to, points in joined.items()}
    return made, {following[state] for state in ends}


def _trimmed(steps: list[dict[int, Ranges]], ends: set[int]) -> Automaton:
    living, grown = set(ends), True
    while grown:
        more = {state for state, row in enumerate(steps) if state not in living and living & set(row)}
        living |= more
        grown = bool(more)
    if 0 not in living:
        return Automaton((), frozenset())
    names = {state: place for place, state in enumerate(sorted(living))}
    rows = [{names[to]: points for to, points in steps[state].items() if to in living} for state in sorted(living)]
    return Automaton(tuple(rows), frozenset(names[state] for state in ends))


def shortest_text(found: Automaton, start: int = 0) -> str | None:
    """A shortest text that leads from a state to an end; None when the language is empty."""
    if not found.steps:
        return None
    texts, order = {start: ""}, [start]
    for state in order:
        if state in found.ends:
            return texts[state]
        for to, points in found.steps[state].items():
            if to not in texts:
                texts[to] = texts[state] + chr(_plainest(points))
                order.append(to)
    return None


def _plainest(points: Ranges) -> int:
    """A letter or digit where there is one, so that texts read well."""
    for wanted in (97, 48, 65):
        for low, high in points:
            if low <= wanted <= high or wanted <= low <= wanted + 9:
                return max(low, wanted)
    return next((max(low, 33) for low, high in points if high >= 33), points[0][0])


# -- back to an expression ----------------------------------------------------------------------------------------


def expression(found: Automaton) -> str:
    """The whole text as one expression of the mask engine, by elimination of states. Raises TooLarge, also if empty."""
    if not found.steps:
        raise TooLarge
    final = len(found.steps)
    edges: dict[int, dict[int, str]] = {
        state: {to: _class(points) for to, points in row.items()} for state, row in enumerate(found.steps)
    }
    for state in found.ends:
        edges[state][final] = ""
    edges[-1] = {0: ""}
    left = set(range(final))
    while left:
        into: dict[int, int] = {}
        for row in edges.values():
            for to in row:
                into[to] = into.get(to, 0) + 1
        state = min(left, key=lambda one: (into.get(one, 0) * len(edges[one]), one))
        _eliminate(edges, state)
        left.discard(state)
        if sum(len(text) for row in edges.values() for text in row.values()) > MOST_TEXT:
            raise TooLarge
    return edges[-1].get(final, "")


def _eliminate(edges: dict[int, dict[int, str]], state: int) -> None:
    row = edges.pop(state)
    loop = row.pop(state, None)
    around = "" if loop is None else f"(?:{loop})*"
    for other in edges.values():
        if state in other:
            before = other.pop(state)
            for to, behind in row.items():
                way = f"{_group(before)}{around}{_group(behind)}"
                other[to] = _either(other[to], way) if to in other else way


def _either(first: str, second: str) -> str:
    if first == second:
        return first
    if "" in (first, second):
        return f"(?:{first or second})?"
    return f"{first}|{second}"


def _group(text: str) -> str:
    return f"(?:{text})" if "|" in text else text


def _class(points: Ranges) -> str:
    """A set of code points as the engine spells it."""
    inside = points
    if len(complement(points)) < len(points):
        inside = complement(points)
        if not inside:
            return "(?s:.)"
        return f"[^{_spelled(inside)}]"
    if len(points) == 1 and points[0][0] == points[0][1]:
        return _one(points[0][0])
    return f"[{_spelled(inside)}]"


def _spelled(points: Ranges) -> str:
    return "".join(_one(low) if low == high else f"{_one(low)}-{_one(high)}" for low, high in points)


def _one(point: int) -> str:
    letter = chr(point)
    return letter if letter.isascii() and letter.isalnum() else f"\\x{{{point:x}}}"
