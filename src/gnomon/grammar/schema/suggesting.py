"""Texts worth trying where a search for an end would be blind: a value its schema names, a text its pattern takes.

Only suggestions: whoever takes one has it judged like any other text. Knows schemas and places in a value.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from gnomon.grammar.schema.language import Automaton, shortest_text
from gnomon.grammar.schema.lookaround import language
from gnomon.grammar.schema.reading import Reading
from gnomon.grammar.schema.validators import Validators

OF_FORMAT = {
    "date": "2000-01-01",
    "time": "00:00:00Z",
    "date-time": "2000-01-01T00:00:00Z",
    "duration": "P1D",
    "email": "a@b.co",
    "hostname": "a.co",
    "ipv4": "0.0.0.0",
    "ipv6": "::",
    "uri": "a:b",
    "uuid": "00000000-0000-0000-0000-000000000000",
}
MOST = 12
"""Suggestions at one place."""
MOST_BRANCHES = 24


def suggestions(reading: Reading, text: bytes) -> Iterator[bytes]:
    """Ways to complete the value or key that is due, or the string that is open."""
    opened_key = reading.mode == "key" and reading.length == reading.start + 1
    if reading.frame is not None and (opened_key or (reading.mode == "name" and not reading.frame.is_array)):
        for name in _missing(reading):
            yield json.dumps(name, ensure_ascii=False).encode()[opened_key:]
    if reading.mode == "string":
        for automaton in _automata(reading.validators, reading.due()):
            rest = rest_of(automaton, _content(text[reading.start :]))
            if rest is not None:
                yield (json.dumps(rest, ensure_ascii=False)[1:-1] + '"').encode()
    opened = reading.mode == "string" and reading.length == reading.start + 1
    if opened or reading.mode == "value":
        for value in _values(reading.validators, reading.due()):
            if isinstance(value, str) or not opened:
                yield json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()[opened:]


def _missing(reading: Reading) -> list[str]:
    """Required keys that the open object has not yet."""
    frame = reading.frame
    assert frame is not None
    schemas = [reading.validators.at(pointer) for pointer in sorted(frame.here)]
    required = [schema.get("required") for schema in schemas]
    wanted = [name for names in required if isinstance(names, list) for name in names if isinstance(name, str)]
    return [name for name in dict.fromkeys(wanted) if name not in frame.names][:MOST]


def rest_of(automaton: Automaton, content: str | None) -> str | None:
    """The shortest text that completes this one."""
    if content is None or not automaton.steps:
        return None
    state = 0
    for letter in content:
        point = ord(letter)
        steps = automaton.steps[state].items()
        following = next((to for to, points in steps if any(a <= point <= b for a, b in points)), None)
        if following is None:
            return None
        state = following
    return shortest_text(automaton, state)


def _content(raw: bytes) -> str | None:
    try:
        found = json.loads(raw + b'"')
    except ValueError:
        return None
    return found if isinstance(found, str) else None


def _schemas(validators: Validators, here: frozenset[str]) -> Iterator[Mapping[str, Any]]:
    """The schemas that speak, or may speak, about this place."""
    queue, seen = sorted(here), set[str]()
    while queue and len(seen) < MOST_BRANCHES:
        pointer = queue.pop(0)
        if pointer in seen:
            continue
        seen.add(pointer)
        schema = validators.at(pointer)
        if not isinstance(schema, Mapping):
            continue
        yield schema
        for keyword in ("anyOf", "oneOf"):
            if isinstance(schema.get(keyword), list):
                branches = [f"{pointer}/{keyword}/{place}" for place in range(len(schema[keyword]))]
                queue += sorted(validators.expanded(branches[:MOST_BRANCHES]))


def _automata(validators: Validators, here: frozenset[str]) -> Iterator[Automaton]:
    for schema in _schemas(validators, here):
        pattern = schema.get("pattern")
        if isinstance(pattern, str) and (automaton := _of_string(pattern, *_lengths(schema))) is not None:
            yield automaton


def _lengths(schema: Mapping[str, Any]) -> tuple[int, int | None]:
    least, most = schema.get("minLength", 0), schema.get("maxLength")
    return (int(least) if isinstance(least, int | float) else 0), (int(most) if isinstance(most, int) else None)


@lru_cache(maxsize=256)
def _of_string(pattern: str, least: int, most: int | None) -> Automaton | None:
    return language(pattern, least=least, most=most) or language(pattern)


def _values(validators: Validators, here: frozenset[str]) -> Iterator[Any]:
    count = 0
    for schema in _schemas(validators, here):
        for value in _named(schema):
            yield value
            count += 1
            if count >= MOST:
                return


def _named(schema: Mapping[str, Any]) -> Iterator[Any]:
    if "const" in schema:
        yield schema["const"]
    for keyword in ("enum", "examples"):
        if isinstance(schema.get(keyword), list):
            yield from sorted(schema[keyword], key=lambda value: len(json.dumps(value)))[:4]
    if "default" in schema:
        yield schema["default"]
    pattern = schema.get("pattern")
    if isinstance(pattern, str) and (automaton := _of_string(pattern, *_lengths(schema))) is not None:
        text = shortest_text(automaton)
        if text is not None:
            yield text
    if isinstance(schema.get("format"), str) and schema["format"] in OF_FORMAT:
        yield OF_FORMAT[schema["format"]]
    step = schema.get("multipleOf")
    if isinstance(step, int) and not isinstance(step, bool) and step > 0:
        yield from _multiples(step, schema)


def _multiples(step: int, schema: Mapping[str, Any]) -> Iterator[int]:
    low = schema.get("minimum", schema.get("exclusiveMinimum"))
    high = schema.get("maximum", schema.get("exclusiveMaximum"))
    if isinstance(low, int | float) and math.isfinite(low):
        first = math.ceil(low / step) if isinstance(low, float) else -(-low // step)
        yield from (first * step, (first + 1) * step)
    elif isinstance(high, int | float) and math.isfinite(high):
        last = math.floor(high / step) if isinstance(high, float) else high // step
        yield from (last * step, (last - 1) * step)
    else:
        yield 0
