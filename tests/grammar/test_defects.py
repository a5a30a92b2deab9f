"""Each promise with the code broken on purpose: it holds as the code stands, and fails when the named line is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest

from gnomon.grammar import compile
from gnomon.grammar.cache import key_of
from gnomon.grammar.calls import HERMES, CallReader
from gnomon.grammar.closing import NoChecks
from gnomon.grammar.plans import make, plan_of, restore
from gnomon.grammar.schema import lookaround
from gnomon.grammar.selecting import _Summing
from gnomon.model import Model
from gnomon.stages import Ruling

UNIQUE = {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2}
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "tags": {"type": "array", "items": {"type": "string"}}},
    "required": ["name", "tags"],
}


def drawn(model: Model, schema: Any, limit: int, seed: int) -> Any:
    return model.generate("abc", grammar=compile(schema), max_tokens=limit, temperature=1.5, seed=seed)


def every_drawn_text_is_valid(model: Model) -> bool:
    texts = [drawn(model, UNIQUE, 12, seed).text for seed in range(12)]
    return all(len(set(json.loads(text))) == len(json.loads(text)) for text in texts)


def every_text_is_whole_within_its_limit(model: Model) -> bool:
    return all(drawn(model, PERSON, 40, seed).completed for seed in range(4))


def no_invalid_text_is_accepted(model: Model) -> bool:
    return not compile(UNIQUE).accepts("[1,1]", whitespace="as_generated", any_order=False)


def first_bytes_sum_to_one(model: Model) -> bool:
    summing = _Summing(model, list(model.encode("the")), 0.0)
    mass = math.fsum(summing.text(bytes([byte]), ended=False)[0] for byte in range(256))
    row = summing._row((), b"")
    silent = math.fsum(float(row[i]) for i in range(len(row)) if not summing.spelling.bytes_of(i))
    return abs(mass + silent - 1) < 1e-9


def healed_text_is_not_said_twice(model: Model) -> bool:
    answer = model.generate("the qui", heal=True, max_tokens=6, ignore_eos=True, seed=1, temperature=1.0)
    whole = model.tokenizer.decode(answer.token_ids)
    return answer.text != whole


def look_ahead_is_in_the_mask(model: Model) -> bool:
    lookaround.language.cache_clear()
    lookaround.plain_expression.cache_clear()
    grammar = compile({"type": "string", "pattern": r"^(?!no)\w{3}$"})
    return not grammar.accepts('"nob"') and bool(grammar.accepts('"yes"', whitespace="as_generated", any_order=False))


def objects_keep_their_order(model: Model) -> bool:
    schema = {"properties": {"b": {"type": "null"}, "a": {"type": "null"}}, "not": {"required": ["c"]}}
    text = '{"b":null,"a":null}'
    return bool(compile({"type": "object", **schema}).accepts(text, whitespace="as_generated", any_order=False))


def the_cache_tells_orders_apart(model: Model) -> bool:
    return key_of({"schema": {"a": 1, "b": 2}}) != key_of({"schema": {"b": 2, "a": 1}})


def a_restored_grammar_checks_what_the_mask_leaves(model: Model) -> bool:
    arguments = {"schema": UNIQUE}
    again = restore(arguments, plan_of(make(arguments)))
    place = again.checks.begin()
    return again.checks.read(place, b"[1,1") is None or again.checks.read(place, b"[1,1]") is None


def custom_calls_are_read(model: Model) -> bool:
    reader = CallReader(HERMES)
    reader.push(HERMES.custom_opening("note") + "a}" + HERMES.custom_tail)
    return [(call.name, call.arguments) for call in reader.calls] == [("note", "a}")]


DEFECTS: list[tuple[str, Any, Callable[[Model], bool]]] = [
    ("gnomon.grammar.grammar.SchemaChecks", lambda validators: NoChecks(), every_drawn_text_is_valid),
    ("gnomon.grammar.stage.GrammarStage._in_time", lambda self: Ruling(), every_text_is_whole_within_its_limit),
    ("gnomon.grammar.grammar.SchemaChecks", lambda validators: NoChecks(), no_invalid_text_is_accepted),
    ("gnomon.grammar.selecting.Spelling.beyond", lambda self, text: [], first_bytes_sum_to_one),
    ("gnomon.session.TextSession._new_part", lambda self, text: text, healed_text_is_not_said_twice),
    ("gnomon.grammar.schema.lookaround.negated", lambda term: term, look_ahead_is_in_the_mask),
    ("gnomon.grammar.schema.lowering.NameOrder.sorted", lambda self, names: sorted(names), objects_keep_their_order),
    (
        "gnomon.grammar.cache.json.dumps",
        lambda value, **_: json.JSONEncoder(sort_keys=True).encode(value),
        the_cache_tells_orders_apart,
    ),
    (
        "gnomon.grammar.schema.validators.Validators.watch",
        lambda self, left: None,
        a_restored_grammar_checks_what_the_mask_leaves,
    ),
    ("gnomon.grammar.calls.CallReader._tail", property(lambda self: self.form.tail), custom_calls_are_read),
]


@pytest.mark.parametrize(("line", "broken", "promise"), DEFECTS, ids=lambda one: getattr(one, "__name__", None))
def test_a_promise_holds_and_breaks_with_its_line(
    line: str, broken: Any, promise: Callable[[Model], bool], tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert promise(tiny)
    monkeypatch.setattr(line, broken)
    assert not promise(tiny)
    monkeypatch.undo()
    assert promise(tiny)
