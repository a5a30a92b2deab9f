"""What a schema may weigh. Every limit is checked before anything is compiled, so that a bomb costs microseconds.

Also answers which draft a schema is written in. Raises GrammarError naming the path and the limit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gnomon.errors import GrammarError

Schema = Mapping[str, Any] | bool
MOST_BYTES = 2_000_000
MOST_DEPTH = 96
MOST_VALUES = 200_000
MOST_PATTERN = 10_000
MOST_ENUM = 10_000
MOST_COUNT = 100_000
"""Greatest minLength, minItems or minProperties: a text that long is never generated, and its grammar is huge."""
DRAFTS = {
    "draft-04": "draft 4",
    "draft-06": "draft 6",
    "draft-07": "draft 7",
    "2019-09": "draft 2019-09",
    "2020-12": "draft 2020-12",
}
COUNTS = ("minLength", "minItems", "minProperties", "minContains")


def check_bounds(schema: Any) -> None:
    """Refuse what is too large, too deep, or no JSON. Walks without recursion: depth itself is the attack."""
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"A schema is a JSON object or true or false, not {type(schema).__name__}.", param="schema")
    stack: list[tuple[Any, str, int]] = [(schema, "#", 0)]
    values = size = 0
    while stack:
        value, path, depth = stack.pop()
        values += 1
        if depth > MOST_DEPTH:
            raise GrammarError(f"The schema is nested deeper than {MOST_DEPTH} levels at {path[:80]}….", param="schema")
        if values > MOST_VALUES:
            raise GrammarError(f"The schema holds more than {MOST_VALUES} values.", param="schema")
        if isinstance(value, Mapping):
            for key, item in value.items():
                if not isinstance(key, str):
                    raise GrammarError(f"The key {key!r} at {path} is no text.", param="schema")
                size += len(key)
                stack.append((item, f"{path}/{escape(key)}", depth + 1))
                _check_keyword(key, item, path)
        elif isinstance(value, list | tuple):
            stack.extend((item, f"{path}/{place}", depth + 1) for place, item in enumerate(value))
        elif isinstance(value, str):
            size += len(value)
        elif value is not None and not isinstance(value, bool | int | float):
            raise GrammarError(f"The value at {path} is a {type(value).__name__}, which JSON has not.", param="schema")
        if size > MOST_BYTES:
            raise GrammarError(f"The schema's texts are longer than {MOST_BYTES} characters together.", param="schema")


def _check_keyword(key: str, value: Any, path: str) -> None:
    counted = key in COUNTS and isinstance(value, int | float) and not isinstance(value, bool)
    if counted and value > MOST_COUNT:
        raise GrammarError(f"`{key}` at {path} is {value}; more than {MOST_COUNT} is refused.", param="schema")
    if key == "enum" and isinstance(value, list) and len(value) > MOST_ENUM:
        raise GrammarError(f"The enum at {path} has {len(value)} values; at most {MOST_ENUM}.", param="schema")
    if key == "pattern" and isinstance(value, str) and len(value) > MOST_PATTERN:
        raise GrammarError(f"The pattern at {path} is longer than {MOST_PATTERN} characters.", param="schema")


def plain(schema: Any) -> Any:
    """A deep copy made of dicts and lists, without keys that would speak to the mask engine."""
    if type(schema) in _LEAVES:
        return schema
    if isinstance(schema, Mapping):
        return {str(key): plain(item) for key, item in schema.items() if key != "x-guidance"}
    if isinstance(schema, list | tuple):
        return [plain(item) for item in schema]
    return json.loads(json.dumps(schema))  # a subclass of a leaf, as members of some enumerations are


_LEAVES = frozenset([str, int, float, bool, type(None)])


def draft_of(schema: Schema) -> str:
    """The draft that `$schema` names; 2020-12 without one."""
    named = schema.get("$schema") if isinstance(schema, Mapping) else None
    if isinstance(named, str):
        return next((draft for mark, draft in DRAFTS.items() if mark in named), "a dialect of its own")
    return "draft 2020-12"


def escape(key: str) -> str:
    """A key as a step of a JSON pointer."""
    return key.replace("~", "~0").replace("/", "~1")
