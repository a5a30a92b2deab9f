"""The native walk against the Python matcher: matches, frontiers, stops and saved states, at every piece."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.guard import Guard, automaton, walking
from gnomon.guard.automaton import Program, Source
from gnomon.guard.lane import Lane
from gnomon.guard.matcher import Match, Matcher
from gnomon.guard.regex import parse
from gnomon.guard.rules import pack

from . import reference
from .test_matcher import CUTS, TEXTS, patterns
from .test_session import KEY

needs_native = pytest.mark.skipif(walking.native_walk() is None, reason="built without a C++ compiler")
RULES = st.lists(st.tuples(st.none() | patterns(), patterns(), st.booleans(), st.booleans()), min_size=1, max_size=3)
OVERFLOW = st.dictionaries(st.integers(0, 2), st.sampled_from(["redact_run", "block", "release"]))


@dataclass
class Odd:
    """An `accept` that depends on what is found, as checks do."""

    def __call__(self, rule: int, start: int, end: int) -> bool:
        return (end - start + rule) % 2 == 1


def program_of(rules: list[tuple[str | None, str, bool, bool]]) -> Program:
    return Program([Source(None if b is None else parse(b), parse(s), gate, gate and u) for b, s, gate, u in rules])


def both(program: Program, max_hold: int, overflow: Any) -> tuple[Matcher, Matcher]:
    return Matcher(program, max_hold, Odd(), overflow), walking.NativeMatcher(program, max_hold, Odd(), overflow)


def real(found: list[Match]) -> list[Match]:
    """Without matches of nothing: which of these are told depends on when one asks, and no rule may match nothing."""
    return sorted(match for match in found if match.end > match.start)


def plain(matcher: Matcher) -> Any:
    return json.loads(json.dumps(matcher.state()))


@needs_native
@settings(max_examples=500, deadline=None)
@given(RULES, TEXTS, CUTS, st.sampled_from([2, 5, 4096]), OVERFLOW)
def test_native_and_python_agree_after_every_piece(
    rules: list[tuple[str | None, str, bool, bool]], text: str, cuts: list[int], max_hold: int, overflow: Any
) -> None:
    slow, fast = both(program_of(rules), max_hold, overflow)
    for piece in reference.splits(text, cuts):
        slow.feed(piece)
        fast.feed(piece)
        assert (fast.frontier, fast.first_start, fast.oldest, fast.stopped) == (
            slow.frontier, slow.first_start, slow.oldest, slow.stopped,
        )  # fmt: skip
        assert [vars(run) for run in fast.runs] == [vars(run) for run in slow.runs]
        assert fast.take() == slow.take()
        assert plain(fast) == plain(slow)
    slow.finish()
    fast.finish()
    assert fast.take() == slow.take() and plain(fast) == plain(slow)


@needs_native
@settings(max_examples=200, deadline=None)
@given(RULES, TEXTS, st.integers(0, 24), st.sampled_from([3, 4096]), st.booleans())
def test_a_state_saved_by_one_goes_on_in_the_other(
    rules: list[tuple[str | None, str, bool, bool]], text: str, cut: int, max_hold: int, from_native: bool
) -> None:
    whole = Matcher(program_of(rules), max_hold, Odd())
    whole.feed(text)
    whole.finish()
    first, second = both(program_of(rules), max_hold, {})
    if from_native:
        first, second = second, first
    first.feed(text[:cut])
    found = first.take()
    second.restore(plain(first))
    second.feed(text[cut:])
    second.finish()
    assert real(found + second.take()) == real(whole.take()) and second.stopped == whole.stopped


@needs_native
@settings(max_examples=60, deadline=None)
@given(RULES, TEXTS, CUTS)
def test_an_emptied_cache_of_states_changes_nothing(
    rules: list[tuple[str | None, str, bool, bool]], text: str, cuts: list[int]
) -> None:
    slow = Matcher(program_of(rules), 4096, Odd())
    slow.feed(text)
    slow.finish()
    expected = slow.take()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(automaton, "CACHE_STATES", 2)
        fast, found = walking.NativeMatcher(program_of(rules), 4096, Odd()), []
        for piece in reference.splits(text, cuts):
            fast.feed(piece)
            found += fast.take()
        fast.finish()
    assert real(found + fast.take()) == real(expected) and fast.stopped == slow.stopped


@needs_native
def test_rooms_grow_with_what_a_text_needs() -> None:
    """Hundreds of threads in different states at once, and thousands of events in one piece."""
    program = Program([Source(None, parse("a[ab]{300}c")), Source(None, parse("(?:ab)+|b{1,9}"))])
    text = "ab" * 400 + "c" + "b" * 50
    slow, fast = Matcher(program), walking.NativeMatcher(program)
    for matcher in (slow, fast):
        matcher.feed(text)
        matcher.finish()
    assert fast.take() == slow.take() and fast._rooms[0] >= 128


@needs_native
def test_the_packs_find_the_same_natively(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [*pack("secrets"), *pack("pii")]
    program = Program([Source(rule.before, rule.secret) for rule in rules])
    text = (
        "api_key = 'sk-ant-api03-AbCdEf0123456789AbCdEf0123456789AbCdEf0123456789' and mail a.b@example.com, "
        'call +1 415 555 2671 or 4111 1111 1111 1111; token: "ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l"\n'
    ) * 30
    slow, fast = Matcher(program), walking.NativeMatcher(program)
    for matcher in (slow, fast):
        matcher.feed(text)
        matcher.finish()
    found = fast.take()
    assert found == slow.take() and len(found) > 100


def test_without_the_library_the_matcher_is_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walking, "native_walk", lambda: None)
    made = walking.make_matcher(Program([Source(None, parse("ab"))]), 4096, Odd(), {})
    assert type(made) is Matcher


@needs_native
def test_a_hundred_megabytes_stream_through_in_bounded_memory() -> None:
    """What a session keeps is counted, not timed; long runs, keys and other scripts among the prose."""
    session = Guard().session()
    piece = ("All of it is said in plain words, and some of it twice. " * 400 + "שלום " * 40 + "x" * 9000 + "\n") * 31
    released = kept = 0
    while released < 100_000_000:
        released += len(session.push(piece))
        lane = session.lanes[0]
        assert isinstance(lane, Lane) and isinstance(lane.matcher, walking.NativeMatcher)
        kept = max(kept, len(session._text), len(lane.text), len(lane.matcher._blob), len(lane.matcher.given))
    assert kept < 100_000 and session.findings == []
    released += len(session.push(f" key {KEY} end")) + len(session.finish())
    assert [finding.rule for finding in session.findings] == ["github-token"]


def test_long_text_of_any_script_is_classified_as_short_text_is() -> None:
    program = Program([Source(None, parse("[a-zא-ת😀-😅]+é"))])
    text = "".join(map(chr, [*range(0x20, 0x700), 0xD800, 0xFFFF, *range(0x1F5FF, 0x1F610), 0x10FFFF]))
    assert program.classify(text) == b"".join(program.classify(letter) for letter in text)
