"""Patterns that look around, worked out beforehand: the same texts as Python's `re` takes, and a shortest one."""

from __future__ import annotations

import random
import re

import pytest

from gnomon.grammar import compile
from gnomon.grammar.closing import complete
from gnomon.grammar.schema.language import shortest_text
from gnomon.grammar.schema.lookaround import language, plain_expression

EXACT = [
    r"^(?!no)\w{3,5}$",
    r"^(?=.*[A-Z])(?=.*\d).{4,}$",
    r"\bfoo\b",
    r"\Bo",
    r"^(?!.*\.\.)[a-z.]+$",
    r"(?<!a)b",
    r"(?<=fo)o$",
    r"^(?!\s*$).+",
    r"^(?!(con|prn|aux)$)[a-z]{2,6}$",
    r"a(?=b)",
    r"^(?!-)[a-z0-9-]{1,6}(?<!-)$",
    r"x|^y$",
    r"^[^\s]+(?<!/)$",
    r"^((?!x)a|b)?c$",
    r"^(?![\s\S]*_)\w*$",
]
LEFT = [r"^(?:(?!foo).)*$", r"^(a|b(?!c))+$", r"(a)\1", r"(?i:a)"]


def texts() -> list[str]:
    rng = random.Random(20261125)
    words = ["foo", "no", "con", "prn", "aux", "a.b", "A1", "", "--", "y", "x"]
    made = ["".join(rng.choices("abcfonxy._-1A B/\n", k=rng.randint(0, 8))) for _ in range(1500)]
    return [*made, *(first + second + third for first in words for second in words for third in ("", "o", "2"))]


def as_python(expression: str) -> str:
    return re.sub(r"\\x\{([0-9a-f]+)\}", lambda found: f"\\U{int(found[1], 16):08x}", expression)


@pytest.mark.parametrize("pattern", EXACT)
def test_the_expression_takes_exactly_the_texts_in_which_the_pattern_is_found(pattern: str) -> None:
    expression = plain_expression(pattern)
    assert expression is not None
    ours = re.compile(as_python(expression))
    theirs = re.compile(pattern.replace("$", r"\Z"), re.ASCII)
    found = [(bool(ours.fullmatch(text)), bool(theirs.search(text)), text) for text in texts()]
    assert [text for mine, peer, text in found if mine != peer] == []
    assert 0 < sum(mine for mine, _, _ in found) < len(found)


@pytest.mark.parametrize("pattern", EXACT)
def test_a_shortest_text_is_found_and_none_is_shorter(pattern: str) -> None:
    automaton = language(pattern)
    assert automaton is not None
    shortest = shortest_text(automaton)
    assert shortest is not None and re.search(pattern.replace("$", r"\Z"), shortest, re.ASCII)
    matching = [t for t in texts() if re.search(pattern.replace("$", r"\Z"), t, re.ASCII)]
    assert all(len(shortest) <= len(text) for text in matching)


@pytest.mark.parametrize("pattern", LEFT)
def test_what_has_no_automaton_this_way_is_left_to_the_check_afterwards(pattern: str) -> None:
    assert plain_expression(pattern) is None


def test_contradicting_assertions_have_no_text() -> None:
    automaton = language(r"^(?=a)(?=b).*$")
    assert automaton is not None and shortest_text(automaton) is None


def test_such_a_pattern_is_enforced_by_the_mask_and_its_shortest_text_is_known() -> None:
    grammar = compile({"type": "string", "pattern": r"^(?!no)\w{3,5}$"})
    assert not grammar.report.post_validated
    assert len(grammar.shortest()) == 5
    assert grammar.accepts('"yes"', whitespace="as_generated", any_order=False)
    refused = grammar.accepts('"nobody"', whitespace="as_generated", any_order=False)
    assert not refused and refused.position == 2  # at the letter, not at the end


def test_a_regex_that_looks_around_is_taken_from_end_to_end() -> None:
    grammar = compile(regex=r"(?!no)\w{3,5}")
    assert grammar.accepts("yes") and not grammar.accepts("nope") and not grammar.accepts("yes!")


@pytest.mark.parametrize(
    ("schema", "shortest"),
    [
        ({"type": "string", "pattern": r"[A-Z]\d$"}, '"A0"'),
        ({"type": "string", "pattern": "qqq$", "minLength": 5}, '"aaqqq"'),
        ({"anyOf": [{"type": "string", "pattern": "x|^yy$"}]}, '"x"'),
        ({"type": "integer", "multipleOf": 999983, "minimum": 10**9}, "1000982983"),
        ({"type": "array", "items": {"type": "string", "pattern": r"k\b"}, "minItems": 1}, '["k"]'),
    ],
)
def test_the_search_for_an_end_is_told_what_a_pattern_or_a_number_needs(schema: object, shortest: str) -> None:
    assert compile(schema).shortest() == shortest


def test_from_the_middle_of_a_text_the_way_to_an_end_is_the_patterns_own() -> None:
    grammar = compile(regex=r".*x[\s\S]q")
    matcher = grammar.byte_matcher()
    assert matcher.advance(list(b"some words")) == 10
    found, _ = complete(matcher, b"some words", grammar.checks, grammar.checks.begin())
    assert found == b"xaq"


def test_a_number_and_a_format_do_not_lead_the_search_astray() -> None:
    schema = {
        "type": "object",
        "properties": {
            "tags": {"type": "string", "pattern": "^[a-z]{2,8}$"},
            "n": {"type": "number", "minimum": 10},
            "id": {"type": "string", "format": "email"},
        },
        "required": ["tags", "n", "id"],
        "additionalProperties": False,
        "dependentRequired": {"n": ["id"]},
    }
    grammar = compile(schema)
    assert grammar.shortest().startswith('{"tags":"aa","n":10,"id":"')
    assert grammar.accepts(grammar.shortest())
