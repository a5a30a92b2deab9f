"""EBNF as the W3C writes it: what a grammar takes, and what is wrong with one, by line."""

from __future__ import annotations

import pytest

from gnomon.errors import GrammarError
from gnomon.grammar import compile

SUMS = """Expr  ::= Term ( ( '+' | "-" ) Term )*   /* sums */
Term  ::= #x30 | [1-9] Digit*
Digit ::= [0-9]
"""
NAMES = r"""Names    ::= Name (#x20 Name)*
Name     ::= ([A-Z_a-z] - [Qq]) NameChar?
NameChar ::= [^#x41-#x5A"\-] - 'x'
"""


@pytest.mark.parametrize(
    ("grammar", "right", "wrong"),
    [
        (SUMS, ["1+2-30", "0", "12"], ["01", "1+", "", "+1", "1 + 2"]),
        (NAMES, ["a", "aé Bb", "a'", "b["], ["q", "aX", 'a"', "a\\", "a-", "ax", "a   b"]),
        ("A ::= '' | '\\' A", ["", "\\\\"], ["a"]),
        ("A ::= B? B-c+\nB ::= 'b'\nB-c ::= 'c'", ["bcc", "c"], ["b", ""]),
    ],
)
def test_it_takes_what_the_notation_means(grammar: str, right: list[str], wrong: list[str]) -> None:
    made = compile(ebnf=grammar)
    assert [text for text in right if not made.accepts(text)] == []
    assert [text for text in wrong if made.accepts(text)] == []
    assert made.accepts(made.shortest())


@pytest.mark.parametrize(
    ("grammar", "said"),
    [
        ("", "at most a million|no rule"),
        ("just text", "no rule"),
        ("A ::= 'a'\nB ::= (", "line 2"),
        ("A ::= C", "no rule 'C'"),
        ("A ::= 'a'\nA ::= 'b'", "line 2: the rule 'A'"),
        ("A ::= $", "line 1"),
        ("A ::= 'ab' - 'c'", "character classes"),
        ("A ::= " + "(" * 5000 + "'a'" + ")" * 5000, "nested deeper"),
    ],
)
def test_what_is_wrong_is_said_with_its_line(grammar: str, said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        compile(ebnf=grammar)
