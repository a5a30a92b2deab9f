"""The matcher against the plainest reference: random rules, random text, random splits; always equal."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.guard import automaton
from gnomon.guard.automaton import Program, Source
from gnomon.guard.matcher import Match, Matcher
from gnomon.guard.regex import PatternError, parse, widths
from gnomon.guard.walking import NativeMatcher, native_walk

from . import reference

ATOMS = st.sampled_from(
    ["a", "b", "c", "[ab]", "[^a]", ".", r"\w", r"\b", r"\B", "^", "$", "(?<![b])", "(?=[c ]|$)", "(?!a)"]
)


def patterns() -> st.SearchStrategy[str]:
    def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
        return st.one_of(
            st.lists(inner, min_size=1, max_size=3).map("".join),
            st.lists(inner, min_size=2, max_size=3).map(lambda parts: f"(?:{'|'.join(parts)})"),
            st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,3}", "{2,}"])).map(
                lambda p: f"(?:{p[0]}){p[1]}"
            ),
        )

    return st.recursive(ATOMS, grow, max_leaves=8)


TEXTS = st.text(alphabet="aabbc d", max_size=24)
CUTS = st.lists(st.integers(0, 24), max_size=8)


KINDS = [Matcher, NativeMatcher] if native_walk() else [Matcher]


def run(
    program: Program, pieces: list[str], kind: type[Matcher] = Matcher, **options: object
) -> tuple[list[Match], list[int]]:
    matcher = kind(program, **options)  # type: ignore[arg-type]
    found: list[Match] = []
    frontiers = []
    for piece in pieces:
        matcher.feed(piece)
        found += matcher.take()
        frontiers.append(matcher.frontier)
    matcher.finish()
    return sorted(found + matcher.take()), frontiers


@settings(max_examples=400, deadline=None)
@given(st.lists(st.tuples(st.none() | patterns(), patterns()), min_size=1, max_size=3), TEXTS, CUTS)
def test_matches_equal_the_reference_whatever_the_split(
    rules: list[tuple[str | None, str]], text: str, cuts: list[int]
) -> None:
    trees = [(None if b is None else parse(b), parse(s)) for b, s in rules]
    program = Program([Source(b, s) for b, s in trees])
    expected = sorted((a, e, rule) for rule, (b, s) in enumerate(trees) for a, e in reference.matches(b, s, text))
    for pieces in ([text], list(text), list(reference.splits(text, cuts))):
        for kind in KINDS:
            found, frontiers = run(program, pieces, kind)
            assert [(m.start, m.end, m.rule) for m in found if m.end > m.start] == expected
            assert frontiers == sorted(frontiers)


@settings(max_examples=150, deadline=None)
@given(patterns(), st.text(alphabet="aabbc d", max_size=8), st.text(alphabet="aabbc d", max_size=6))
def test_text_before_the_frontier_is_in_no_later_match(pattern: str, begun: str, more: str) -> None:
    tree = parse(pattern)
    matcher = Matcher(Program([Source(None, tree)]))
    matcher.feed(begun)
    known = {(m.start, m.end) for m in matcher.take()}
    for start, end in reference.matches(None, tree, begun + more):
        assert start >= matcher.frontier or (start, end) in known


@settings(max_examples=100, deadline=None)
@given(patterns(), st.text(alphabet="aabbc d", max_size=6))
def test_text_is_held_only_when_some_continuation_makes_it_part_of_a_match(pattern: str, begun: str) -> None:
    tree = parse(pattern)
    if (widths(tree)[1] or 99) > 4:
        return
    matcher = Matcher(Program([Source(None, tree)]))
    matcher.feed(begun)
    held = matcher.frontier
    if held == len(begun):
        return
    continuations = [""]
    for _ in range(5):
        if any(s == held for c in continuations for s, e in _all(tree, begun + c)):
            return
        continuations = [c + letter for c in continuations for letter in "abc d"]
    # Two assertions together can be impossible to meet; plain sets never are.
    assert any(sign in pattern for sign in ("\\b", "\\B", "^", "$", "(?")), (pattern, begun)


def _all(tree: object, text: str) -> list[tuple[int, int]]:
    return [(s, e) for s in range(len(text)) for e in reference.ends(tree, text, s) if e > s]  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(patterns(), TEXTS)
def test_whatever_python_finds_lies_in_a_match(pattern: str, text: str) -> None:
    """Python's dialect writes our `(?=[c ]|$)` the same way; its `$` also stands before a final newline."""
    found = [(m.start, m.end) for m in run(Program([Source(None, parse(pattern))]), [text])[0]]
    for match in re.finditer(pattern.replace("$", r"\\Z"), text, re.ASCII):
        if match.end() > match.start():
            assert any(start <= match.start() and match.end() <= end for start, end in found)


@settings(max_examples=100, deadline=None)
@given(st.lists(patterns(), min_size=1, max_size=2), TEXTS, st.integers(0, 24))
def test_a_saved_and_resumed_matcher_goes_on_as_if_nothing_happened(rules: list[str], text: str, cut: int) -> None:
    program = Program([Source(None, parse(rule)) for rule in rules])
    whole, _ = run(program, [text])
    first = Matcher(program)
    first.feed(text[:cut])
    found = first.take()
    saved = json.loads(json.dumps(first.state()))
    second = Matcher(Program([Source(None, parse(rule)) for rule in rules]))
    second.restore(saved)
    second.feed(text[cut:])
    second.finish()
    rest = sorted(found + second.take())
    assert [m for m in rest if m.end > m.start] == [m for m in whole if m.end > m.start]  # no rule matches nothing


def test_results_are_the_same_when_the_cache_of_states_is_full(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = parse(r"(?:a|b){3,9}c|b[ab ]*d")
    text = "abbaba bcab dabc abbbbbbc ab d" * 20
    expected, _ = run(Program([Source(None, tree)]), [text])
    monkeypatch.setattr(automaton, "CACHE_STATES", 3)
    assert run(Program([Source(None, tree)]), [text])[0] == expected and len(expected) > 20


@pytest.mark.parametrize(
    ("pattern", "place", "what"),
    [
        (r"(a)\1", 3, "back-references"),
        ("a(?=bc)", 1, "wider than one character"),
        ("a[b", 1, "never closed"),
        ("(ab", 0, "never closed"),
        ("a)", 1, "unmatched"),
        ("*a", 0, "nothing to repeat"),
        ("a{3,2}", 0, "upside down"),
        ("a{2000}", 0, "more than 1000"),
        (r"\q", 0, "unknown escape"),
        ("[z-a]", 2, "range"),
        ("[[:nope:]]", 1, "unknown class"),
        ("(?<n", 0, "name"),
    ],
)
def test_a_wrong_pattern_says_what_and_where(pattern: str, place: int, what: str) -> None:
    with pytest.raises(PatternError) as caught:
        parse(pattern)
    assert caught.value.place == place and what in str(caught.value) and f"character {place}" in str(caught.value)


def test_a_pattern_that_would_exhaust_memory_is_refused() -> None:
    with pytest.raises(Exception, match="more than 60000 states"):
        Program([Source(None, parse("(?:(?:a{1000}){1000})b"))])


def test_what_makes_backtracking_explode_is_linear_here() -> None:
    program = Program([Source(None, parse("(?:a+)+(?:a+)+b"))])
    found, _ = run(program, ["a" * 4000 + "c"], max_hold=10_000)
    assert found == [] and len(program.table) < 10


def test_a_run_without_an_end_becomes_one_match_at_max_hold() -> None:
    program = Program([Source(None, parse("x[a-z]{2,}"))])
    text = "ab1x" + "y" * 50 + "1 xab"
    for pieces in ([text], list(text)):
        found, _ = run(program, pieces, max_hold=10)
        assert found == [Match(4 - 1, 54, 0, True), Match(56, 59, 0)]
    matcher = Matcher(program, max_hold=10)
    for letter in text:
        matcher.feed(letter)
        assert matcher.position - matcher.frontier < 10


def test_an_urgent_rule_stops_at_the_first_character_that_completes_it() -> None:
    program = Program([Source(None, parse("secret[0-9]*"), urgent=True)])
    matcher = Matcher(program)
    matcher.feed("a secre")
    assert matcher.stopped is None and matcher.frontier == 2
    matcher.feed("t99 and more")
    assert matcher.stopped == Match(2, 8, 0)
