"""The plainest possible matcher, for comparison: whole text, every place, every end; slow and evident."""

from __future__ import annotations

from collections.abc import Iterator

from gnomon.guard.charset import WORD, contains
from gnomon.guard.regex import Alt, Boundary, Cat, Chars, Group, Look, Node


def ends(node: Node, text: str, at: int) -> set[int]:
    """All places where a match of `node` that begins at `at` can end."""
    if isinstance(node, Chars):
        return {at + 1} if at < len(text) and contains(node.chars, ord(text[at])) else set()
    if isinstance(node, Group):
        return ends(node.node, text, at)
    if isinstance(node, Look):
        place = at - 1 if node.where == "behind" else at
        holds = contains(node.chars, ord(text[place])) if 0 <= place < len(text) else node.edge
        return {at} if holds else set()
    if isinstance(node, Boundary):
        before = at > 0 and contains(WORD, ord(text[at - 1]))
        after = at < len(text) and contains(WORD, ord(text[at]))
        return {at} if (before != after) != node.negated else set()
    if isinstance(node, Alt):
        return set().union(*(ends(option, text, at) for option in node.options))
    if isinstance(node, Cat):
        places = {at}
        for part in node.parts:
            places = set().union(*(ends(part, text, place) for place in places))
        return places
    found = {at} if node.low == 0 else set()
    places, rounds = {at}, 0
    while places and (node.high is None or rounds < node.high):
        places = set().union(*(ends(node.node, text, place) for place in places))
        rounds += 1
        if rounds >= node.low:
            if places <= found:
                break
            found |= places
        if rounds > len(text) + node.low + 1:
            break
    return found


def matches(before: Node | None, secret: Node, text: str) -> list[tuple[int, int]]:
    """Per place the longest match; of several with one end the earliest."""
    best: dict[int, int] = {}
    for start in range(len(text)):
        if before is not None and not any(start in ends(before, text, b) for b in range(start + 1)):
            continue
        found = [end for end in ends(secret, text, start) if end > start]
        if found and max(found) not in best:
            best[max(found)] = start
    return sorted((start, end) for end, start in best.items())


def splits(text: str, cuts: list[int]) -> Iterator[str]:
    places = sorted({min(cut, len(text)) for cut in cuts})
    for low, high in zip([0, *places], [*places, len(text)], strict=True):
        yield text[low:high]
