"""compile(): what is enforced, what is refused, what a report says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from gnomon.errors import GrammarError
from gnomon.grammar import Grammar, compile
from gnomon.model import Model


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Person(BaseModel):
    name: str
    age: int
    colour: Colour | None = None


@dataclass
class Point:
    x: int
    y: int


def exactly(grammar: Grammar, text: str) -> bool:
    return grammar.accepts(text, whitespace="as_generated", any_order=False).ok


@pytest.mark.parametrize(
    ("arguments", "good", "bad"),
    [
        ({"regex": r"\d{3}-[a-z]+"}, "123-abc", "12-abc"),
        ({"choices": ["yes", "no", 'a "quoted" one\n']}, 'a "quoted" one\n', "yess"),
        ({"lark": 'start: "x" /[a-c]+/'}, "xabc", "xd"),
        ({"gbnf": 'root ::= "a" [0-9]+ | "b"'}, "a12", "a"),
        ({"schema": {"type": "integer", "minimum": 3}}, "12", "2"),
        ({"schema": '{"const": [1, {"a": null}]}'}, '[1,{"a":null}]', "[1]"),
        ({"type": Literal["a", "b"]}, '"a"', '"c"'),
        ({"type": list[int]}, "[1,2]", '["1"]'),
        ({"type": Person}, '{"name":"A","age":3}', '{"name":"A"}'),
        ({"type": Point}, '{"x":1,"y":2}', '{"x":1,"y":2,"z":3}'),
    ],
    ids=str,
)
def test_each_kind_accepts_its_own_texts_and_no_others(arguments: dict[str, Any], good: str, bad: str) -> None:
    grammar = compile(**arguments)
    assert grammar.accepts(good) and exactly(grammar, good)
    assert not grammar.accepts(bad) and not exactly(grammar, bad)
    assert exactly(grammar, grammar.shortest())


def test_a_text_of_a_type_becomes_a_value_of_it() -> None:
    person = Person(name="A", age=3, colour=Colour.RED)
    assert compile(type=Person).parse('{"name":"A","age":3,"colour":"red"}') == person
    assert compile(type=Point).parse('{"x":1,"y":2}') == Point(1, 2)
    assert compile({"type": "array"}).parse("[1,2.5]") == [1, 2.5]
    assert compile(regex="a+").parse("aa") == "aa"


def test_any_spelling_of_a_valid_value_is_accepted_and_only_one_is_generated() -> None:
    schema = {"properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["a", "b"]}
    grammar = compile({"type": "object", **schema})
    for text in ('{ "b" : "\\u0078",\n"a":1e0 }', '{"a":1,"b":"x"}'):
        assert grammar.accepts(text)
    assert exactly(grammar, '{"a":1,"b":"x"}')
    assert not exactly(grammar, '{"b":"x","a":1}')
    assert not grammar.accepts('{"a": 1,"b":"x"}', whitespace="as_generated")
    assert grammar.accepts('{"b":"x","a":1}', whitespace="as_generated", any_order=True)
    assert not grammar.accepts('{ "b":"x", "a":1}', any_order=False)


@pytest.mark.parametrize("text", ["", "{", '{"a":1,"a":2}', "NaN", "[1,]", "01", "'a'", "\ufeff1", '"\ud800"', "1 2"])
def test_what_is_no_json_is_refused_with_a_reason(text: str) -> None:
    verdict = compile(True).accepts(text)
    assert not verdict and verdict.reason


def test_a_verdict_says_where_and_why() -> None:
    grammar = compile({"type": "object", "properties": {"é": {"type": "integer"}}, "additionalProperties": False})
    verdict = grammar.accepts('{"é":"x"}', whitespace="as_generated", any_order=False)
    assert (verdict.ok, verdict.position) == (False, 5) and '"x"' in verdict.reason
    assert "/é" in grammar.accepts('{"é":"x"}').reason


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "exactly one"),
        ({"regex": "a", "choices": ["b"]}, "exactly one"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": "a("}, "wrong"),
        ({"lark": "start: nothing"}, "wrong"),
        ({"gbnf": "root = "}, "cannot be read"),
        ({"choices": []}, "one or more"),
        ({"choices": "ab"}, "one or more"),
        ({"schema": "{"}, "not JSON"),
        ({"schema": 3}, "JSON object or true or false"),
        ({"schema": {"type": "nothing"}}, "#/type"),
        ({"schema": {"properties": {"a": {"minimum": "x"}}}}, "#/properties/a/minimum"),
        ({"schema": {"$ref": "#/$defs/missing"}}, "missing"),
        ({"schema": {"$ref": "http://example.com/other.json"}}, "nothing is fetched"),
        ({"schema": {"pattern": "a("}}, "#/pattern"),
        ({"type": object()}, "cannot be written"),
    ],
    ids=str,
)
def test_what_is_wrong_is_an_error_that_says_where(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(GrammarError, match=r"(?s).*" + words.replace("$", r"\$")):
        compile(**arguments)


UNSATISFIABLE: list[Any] = [
    False,
    {"not": {}},
    {"type": "string", "minLength": 4, "maxLength": 3},
    {"type": "object", "properties": {"a": False}, "required": ["a"]},
    {"allOf": [{"type": "string"}, {"type": "integer"}]},
    {"type": "object", "properties": {"child": {"$ref": "#"}}, "required": ["child"]},
    {"enum": [1, 2], "type": "string"},
]


@pytest.mark.parametrize("schema", UNSATISFIABLE, ids=str)
def test_an_unsatisfiable_schema_compiles_says_so_and_accepts_nothing(schema: Any) -> None:
    grammar = compile(schema)
    assert grammar.report.unsatisfiable
    assert not grammar.accepts("{}") and not grammar.accepts("1") and not exactly(grammar, '""')
    with pytest.raises(GrammarError, match="No text satisfies"):
        grammar.shortest()


def test_every_keyword_has_its_line_in_the_report() -> None:
    schema = {
        "title": "T",
        "type": "object",
        "properties": {
            "a": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
            "b": {"type": "string", "format": "stardate", "x-other": 1},
            "c": {"not": {"type": "string"}},
        },
    }
    lines = {(entry.path, entry.keyword): entry.status for entry in compile(schema).report}
    assert lines[("#", "title")] == "annotation"
    assert lines[("#/properties/a", "uniqueItems")] == "post-validated"
    assert lines[("#/properties/a", "items")] == "enforced"
    assert lines[("#/properties/b", "format")] == "annotation"
    assert lines[("#/properties/b", "x-other")] == "annotation"
    assert lines[("#/properties/c", "not")] == "enforced"  # the complement is in the mask
    assert len(lines) == 12


def test_a_schema_cannot_speak_to_the_mask_engine() -> None:
    grammar = compile({"type": "integer", "x-guidance": {"lenient": True}, "not": {"const": 5}})
    assert not exactly(grammar, "5") and exactly(grammar, "6")


def test_formats_assert_or_annotate() -> None:
    schema = {"type": "string", "format": "date"}
    assert not compile(schema).accepts('"yesterday"') and compile(schema).accepts('"2026-11-24"')
    assert compile(schema, formats="annotate").accepts('"yesterday"')


def test_documents_given_along_may_be_referred_to() -> None:
    registry = {"http://example.com/other.json": {"type": "integer"}}
    grammar = compile({"type": "array", "items": {"$ref": "http://example.com/other.json"}}, registry=registry)
    assert exactly(grammar, "[1,2]") and not exactly(grammar, '["a"]')


def test_flexible_whitespace_may_be_generated() -> None:
    schema = {"type": "array", "items": {"type": "integer"}}
    assert exactly(compile(schema, whitespace="flexible"), "[1, 2]")
    assert not exactly(compile(schema), "[1, 2]")


def test_a_least_count_of_keys_is_in_the_mask_of_a_closed_object() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "null"}, "b": {"type": "null"}, "c": {"type": "null"}}}
    grammar = compile(schema | {"additionalProperties": False, "minProperties": 2})
    assert not grammar.report.post_validated
    assert exactly(grammar, '{"a":null,"c":null}') and not exactly(grammar, '{"b":null}')


def test_overlapping_key_patterns_of_a_closed_object_stay_in_the_mask() -> None:
    keys = {"^a": {"type": "integer"}, "b$": {"type": "integer"}}
    grammar = compile({"type": "object", "patternProperties": keys, "additionalProperties": False})
    matcher = grammar.byte_matcher()
    assert matcher.advance(list(b'{"xy"')) == 4  # a key that neither begins with a nor ends with b cannot close
    assert exactly(grammar, '{"a":1,"xb":2}') and not exactly(grammar, '{"a":"x"}')


def test_a_number_beyond_reach_is_refused_with_a_reason() -> None:
    assert "beyond reach" in compile(True).accepts("1e99999999999999999999").reason


ORDERED = {
    "type": "object",
    "properties": {
        "first": {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "integer"}}},
        "second": {
            "type": "object",
            "properties": {"z": {"type": "integer"}, "y": {"type": "integer"}, "x": {"type": "integer"}},
            "required": ["x", "y"],
            "additionalProperties": False,
        },
    },
    "required": ["second"],
}


@pytest.mark.parametrize("also", [{}, {"not": {"required": ["third"]}}], ids=["as written", "normal form"])
def test_each_object_keeps_its_own_order_of_properties(also: dict[str, Any]) -> None:
    grammar = compile({**ORDERED, **also})
    text = '{"first":{"x":1,"y":2},"second":{"z":0,"y":1,"x":2}}'
    assert grammar.accepts(text, whitespace="as_generated", any_order=False)


def test_numbers_of_more_than_64_bits_are_checked_afterwards_or_fail_with_a_sentence() -> None:
    g = compile({"type": "integer", "maximum": 10**37, "minimum": -(10**30)})
    assert [entry.keyword for entry in g.report.post_validated] == ["maximum", "minimum"]
    assert g.accepts("12") and not g.accepts("1" + "0" * 38)
    listed = compile({"enum": [10**30, "a"]})
    assert listed.accepts('"a"') and not listed.accepts('"b"') and not listed.accepts("3")


def test_thousands_of_names_in_one_object_have_a_mask() -> None:
    names = {f"lint_{place}": {"enum": ["allow", "warn"]} for place in range(3000)}
    g = compile({"type": "object", "properties": names, "additionalProperties": False})
    assert g.accepts('{"lint_7":"warn","lint_2999":"allow"}', whitespace="as_generated", any_order=False)
    assert not g.accepts('{"lint_3000":"warn"}', whitespace="as_generated", any_order=False)


def test_a_grammar_tried_over_a_models_vocabulary_is_the_same_one(tiny: Model) -> None:
    given = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
    over_bytes, over_tokens = compile(given), compile(given, tokenizer=tiny.tokenizer)
    assert over_bytes.mask == over_tokens.mask and over_bytes.report == over_tokens.report
    assert over_bytes.shortest() == over_tokens.shortest() == '{"a":""}'
    first, second = over_bytes.bind(tiny.tokenizer), over_tokens.bind(tiny.tokenizer)
    assert first.allowed().tolist() == second.allowed().tolist()


def test_a_member_that_nothing_satisfies_leaves_the_schema_satisfiable_where_it_may_be_left_out() -> None:
    never = {"additionalProperties": False, "oneOf": [{"type": "object", "required": ["text"]}]}
    header = {"properties": {"title": {"anyOf": [{"$ref": "#/definitions/never"}]}}}
    body = {"properties": {"header": header}}
    g = compile({"definitions": {"never": never}, "properties": {"body": body}})
    assert not g.report.unsatisfiable
    assert g.accepts('{"body":{"header":{}}}') and g.accepts("3")
    assert not g.accepts('{"body":{"header":{"title":{"text":1}}}}')
