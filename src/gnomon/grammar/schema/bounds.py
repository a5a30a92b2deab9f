"""What a schema may weigh. Every limit is checked before anything is compiled, so that a bomb costs microseconds.

Also answers which draft a schema is written in. Raises GrammarError naming the path and the limit.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import isfinite
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


def checked(schema: Any) -> Any:
    """A deep copy made of dicts and lists, without keys that would speak to the mask engine.

    Refuses what is too large, too deep, or no JSON, in the same walk: depth itself is an attack, so it ends there.
    """
    if not isinstance(schema, Mapping | bool):
        raise GrammarError(f"A schema is a JSON object or true or false, not {type(schema).__name__}.", param="schema")
    return _Walk().copy(schema, 0)


class _Walk:
    """steps: of the path to the container that is being copied."""

    def __init__(self) -> None:
        self.values = self.size = 0
        self.steps: list[str] = []

    def copy(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if isinstance(value, float) and not isfinite(value):
            raise self._refused(f"The value at {self._path()} is {value}, which JSON has not.")
        if kind in _LEAVES:
            return value
        if depth > MOST_DEPTH:
            raise self._refused(f"The schema is nested deeper than {MOST_DEPTH} levels at {self._path()[:80]}….")
        if kind is dict or isinstance(value, Mapping):
            return self._mapping(value, depth + 1)
        if kind is list or isinstance(value, list | tuple):
            return self._list(value, depth + 1)
        if isinstance(value, str | int | float):
            return json.loads(json.dumps(value))  # a subclass of a leaf, as members of some enumerations are
        raise self._refused(f"The value at {self._path()} is a {kind.__name__}, which JSON has not.")

    def _mapping(self, value: Mapping[str, Any], depth: int) -> dict[str, Any]:
        made = {}
        size = 0
        for key, item in value.items():
            if type(key) is not str:
                key = self._text_of(key)
            if key in _LIMITED:
                _check_keyword(key, item, self._path)
            size += len(key)
            kind = type(item)
            if kind is str:
                size += len(item)
            elif kind not in _LEAVES or (kind is float and not isfinite(item)):
                self.steps.append(key)
                item = self.copy(item, depth)
                self.steps.pop()
            if key != "x-guidance":
                made[key] = item
        self._count(len(value), size)
        return made

    def _list(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        made = []
        size = 0
        for place, item in enumerate(value):
            kind = type(item)
            if kind is str:
                size += len(item)
            elif kind not in _LEAVES or (kind is float and not isfinite(item)):
                self.steps.append(str(place))
                item = self.copy(item, depth)
                self.steps.pop()
            made.append(item)
        self._count(len(value), size)
        return made

    def _count(self, values: int, size: int) -> None:
        self.values += values
        self.size += size
        if self.values > MOST_VALUES:
            raise self._refused(f"The schema holds more than {MOST_VALUES} values.")
        if self.size > MOST_BYTES:
            raise self._refused(f"The schema's texts are longer than {MOST_BYTES} characters together.")

    def _text_of(self, key: Any) -> str:
        if not isinstance(key, str):
            raise self._refused(f"The key {key!r} at {self._path()} is no text.")
        return str(key)

    def _path(self) -> str:
        return "/".join(["#", *map(escape, self.steps)])

    @staticmethod
    def _refused(why: str) -> GrammarError:
        return GrammarError(why, param="schema")


def _check_keyword(key: str, value: Any, path: Callable[[], str]) -> None:
    counted = key in COUNTS and isinstance(value, int | float) and not isinstance(value, bool)
    if counted and value > MOST_COUNT:
        raise GrammarError(f"`{key}` at {path()} is {value}; more than {MOST_COUNT} is refused.", param="schema")
    if key == "enum" and isinstance(value, list) and len(value) > MOST_ENUM:
        raise GrammarError(f"The enum at {path()} has {len(value)} values; at most {MOST_ENUM}.", param="schema")
    if key == "pattern" and isinstance(value, str) and len(value) > MOST_PATTERN:
        raise GrammarError(f"The pattern at {path()} is longer than {MOST_PATTERN} characters.", param="schema")


_LIMITED = frozenset([*COUNTS, "enum", "pattern"])
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
