"""Keys in any order: what decoding may write, what it may not, and what keeps its order says so."""

from __future__ import annotations

import json
from itertools import permutations
from typing import Any

import pytest

from gnomon.grammar import Grammar, compile
from gnomon.grammar.options import GrammarOptions
from gnomon.grammar.plans import make, plan_of, restore
from gnomon.model import Model

NODE = {
    "type": "object",
    "properties": {"value": {"type": "integer"}, "next": {"$ref": "#/$defs/node"}},
    "required": ["value"],
    "additionalProperties": False,
}
TREE: dict[str, Any] = {
    "type": "object",
    "properties": {
        "a": {"type": "integer"},
        "inner": {
            "type": "object",
            "properties": {"x": {"type": "boolean"}, "y": {"type": "null"}},
            "required": ["y"],
            "additionalProperties": False,
        },
        "list": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
    },
    "required": ["list", "a"],
    "additionalProperties": False,
    "$defs": {"node": NODE},
}


def writes(grammar: Grammar, text: str) -> bool:
    return bool(grammar.accepts(text, whitespace="as_generated", any_order=False))


def test_every_order_may_be_written_and_nothing_else() -> None:
    arguments = {"schema": TREE, "any_order": True}
    members = {"a": 1, "inner": {"x": True, "y": None}, "list": [{"next": {"value": 1}, "value": 2}]}
    for grammar in (compile(TREE, any_order=True), restore(arguments, plan_of(make(arguments)))):
        assert grammar.report.warnings == ()
        for order in permutations(members):
            assert writes(grammar, json.dumps({name: members[name] for name in order}, separators=(",", ":")))
        assert writes(grammar, '{"list":[],"a":1}') and writes(grammar, grammar.shortest())
        for text in (
            '{"a":1}',
            '{"a":1,"a":2,"list":[]}',
            '{"a":1,"list":[],}',
            '{"a":1,"list":[],"b":1}',
            '{"a":1,"list":[{"value":1},{"value":1},{"value":1}]}',
            '{"a":1,"list":[],"inner":{"x":true}}',
        ):
            assert not writes(grammar, text), text


def test_without_it_the_schemas_order_is_kept() -> None:
    assert not writes(compile(TREE), '{"list":[],"a":1}')


def test_open_objects_take_other_keys_anywhere_but_none_twice() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "string"}}, "required": ["b"]}
    grammar = compile(schema, any_order=True, whitespace="flexible")
    assert writes(grammar, '{"b":"","zz":[1], "a":1}') and writes(grammar, '{ "a": 1,\n"b":"q" }')
    assert grammar.shortest() == '{"b":""}'
    assert not writes(grammar, '{"zz":1,"a":"x","b":""}') and not writes(grammar, '{"zz":1,"zz":2,"b":""}')


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "patternProperties": {"^a": {"type": "integer"}}, "properties": {"x": {}, "y": {}}},
        {"type": "object", "properties": {f"k{n}": {"const": n} for n in range(70)}, "additionalProperties": False},
    ],
    ids=["patterns", "many"],
)
def test_an_object_that_keeps_its_order_is_named(schema: dict[str, Any]) -> None:
    grammar = compile(schema, any_order=True)
    assert "order" in grammar.report.warnings[0] and "#" in grammar.report.warnings[0]
    assert grammar.accepts(grammar.shortest())


def test_the_option_reaches_decoding_and_the_value_is_valid(tiny: Model) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": [1, 2]}, "b": {"enum": [1, 2]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    options = GrammarOptions.model_validate({"schema": schema, "any_order": True})
    orders = set()
    for seed in range(12):
        done = tiny.generate("abc", grammar=options, max_tokens=30, temperature=1.5, seed=seed)
        assert not isinstance(done, list) and done.completed
        assert set(done.parsed) == {"a", "b"}
        orders.add(tuple(done.parsed))
    assert orders == {("a", "b"), ("b", "a")}
