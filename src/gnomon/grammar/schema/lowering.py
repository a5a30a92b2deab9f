"""Rewrites a schema into what the mask engine takes. What cannot be said there is dropped, and named.

In: a schema, usually in canonical form. Out: a schema that accepts everything the first one accepts (and, where
something was dropped, more). Whoever calls it validates the rest. Knows nothing of grammars or texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import comb
from typing import Any

from gnomon.grammar.schema import formats, patterns

UNSAYABLE = frozenset(
    [
        "if",
        "then",
        "else",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "uniqueItems",
        "maxContains",
        "minContains",
        "unevaluatedProperties",
        "unevaluatedItems",
        "$dynamicRef",
        "$recursiveRef",
    ]
)
SILENT = frozenset(
    [
        "title",
        "description",
        "default",
        "examples",
        "deprecated",
        "readOnly",
        "writeOnly",
        "$comment",
        "$vocabulary",
        "$dynamicAnchor",
        "$recursiveAnchor",
        "contentMediaType",
        "contentEncoding",
        "contentSchema",
    ]
)
"""Keywords that constrain nothing."""
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
MOST_INTEGER = 2**63 - 1
SCHEMA_MAPS = ("properties", "patternProperties", "$defs", "definitions")
SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
SCHEMAS = ("items", "additionalProperties", "additionalItems")
COMPONENTS = ("components",)
HOLDING = frozenset([*SCHEMA_MAPS, *SCHEMA_LISTS, *SCHEMAS, *COMPONENTS])
"""Keywords with schemas below them."""
REWRITTEN = UNSAYABLE.union(
    COUNTS, BOUNDS, ["not", "oneOf", "propertyNames", "patternProperties", "contains", "pattern", "format"]
)
"""Keywords that may have to be rewritten. Most schemas have none of them."""
MOST_BRANCHES = 32
FIRST_PLACES = 6
"""How far into an array the mask looks for the item that `contains` asks for; later places are left to chance."""
Node = dict[str, Any]


@dataclass
class Lowered:
    """schema: for the mask engine. dropped: keywords that it does not say, each with the reason."""

    schema: Any = True
    dropped: dict[str, str] = field(default_factory=dict)

    def drop(self, keyword: str, why: str) -> None:
        self.dropped.setdefault(keyword, why)


def lower(
    schema: Any,
    *,
    order: NameOrder,
    reorder: bool = False,
    also_drop: frozenset[str] = frozenset(),
    old: bool = False,
) -> Lowered:
    """order: of property names in the schema as it was written, reorder: whether this one has lost it; also_drop:
    keywords to give up as well; old: a draft in which `$ref` hides its siblings."""
    result = Lowered()
    result.schema = _Lowering(result, order, reorder, also_drop, old).node(schema)
    return result


class NameOrder:
    """In which order the properties of each object are written in a schema."""

    def __init__(self, schema: Any) -> None:
        self._schema = schema
        self._known: dict[tuple[str, ...], list[str]] = {}

    @cached_property
    def _read(self) -> tuple[dict[str, int], dict[tuple[str, ...], None]]:
        """(place of each name's first mention, the objects' names)."""
        places: dict[str, int] = {}
        objects: dict[tuple[str, ...], None] = {}
        stack = [self._schema]
        while stack:
            value = stack.pop()
            if isinstance(value, dict):
                if isinstance(names := value.get("properties"), dict):
                    objects[tuple(names)] = None
                    for name in names:
                        places.setdefault(name, len(places))
                stack.extend(reversed(list(value.values())))
            elif isinstance(value, list):
                stack.extend(reversed(value))
        return places, objects

    def sorted(self, names: Iterable[str]) -> list[str]:
        """As in the written object that shares most names with these (the smallest such); the others behind them."""
        wanted = tuple(names)
        if wanted not in self._known:
            places, objects = self._read
            together = frozenset(wanted)
            nearest = max(objects, key=lambda one: (len(together.intersection(one)), -len(one)), default=())
            first = {name: place for place, name in enumerate(nearest)}
            last = len(places)
            self._known[wanted] = sorted(wanted, key=lambda name: (first.get(name, last), places.get(name, last)))
        return self._known[wanted]


class _Lowering:
    def __init__(self, result: Lowered, order: NameOrder, reorder: bool, also_drop: frozenset[str], old: bool) -> None:
        self.old = old
        self.reorder = reorder
        self.result = result
        self.order = order
        self.also_drop = also_drop
        self.rewritten = REWRITTEN | also_drop | {"$ref"} if old else REWRITTEN | also_drop
        self.steps: tuple[Callable[[Node], None], ...] = (
            self._drop_unsayable,
            self._not,
            self._one_of,
            self._property_names,
            self._pattern_properties,
            self._min_properties,
            self._contains,
            self._text,
            self._numbers,
        )

    def node(self, schema: Any) -> Any:
        """One schema, lowered with all below it."""
        if not isinstance(schema, dict):
            return schema
        out: Node = {key: value for key, value in schema.items() if key not in SILENT}
        if out.get("enum") == []:
            return False
        if not self.rewritten.isdisjoint(out):
            for step in self.steps:
                step(out)
        for key in HOLDING.intersection(out):
            out[key] = self._below(key, out[key])
        if self.reorder and isinstance(out.get("properties"), dict):
            out["properties"] = {name: out["properties"][name] for name in self.order.sorted(out["properties"])}
        return out

    def _below(self, key: str, value: Any) -> Any:
        if isinstance(value, list):
            return value if key in SCHEMA_MAPS else [self.node(item) for item in value]
        if key in SCHEMA_MAPS:
            return {name: self.node(item) for name, item in value.items()} if isinstance(value, dict) else value
        if key in COMPONENTS:  # where descriptions of HTTP interfaces keep what they refer to
            schemas = value.get("schemas") if isinstance(value, dict) else None
            return {**value, "schemas": self._below("$defs", schemas)} if isinstance(schemas, dict) else value
        return value if key in SCHEMA_LISTS else self.node(value)

    def _drop_unsayable(self, out: Node) -> None:
        if "if" in out and isinstance(out.get("then"), dict) and isinstance(out.get("else"), dict):
            _also(out, {"anyOf": [out["then"], out["else"]]})
        if out.get("minContains") == 0 and "contains" in out:
            del out["contains"], out["minContains"]
            if "maxContains" in out:
                self.result.drop("contains", "only a greatest count: checked when the array closes")
        if self.old and "$ref" in out:
            for key in [key for key in out if key not in ("$ref", "definitions", "$schema", "$id", "id")]:
                del out[key]  # up to draft 7 a reference stands for the whole schema
        if out.get("uniqueItems") is False:
            del out["uniqueItems"]
        for key in [key for key in out if key in UNSAYABLE or key in self.also_drop]:
            self.result.drop(key, "the mask has no such rule")
            del out[key]

    def _not(self, out: Node) -> None:
        if "not" in out:
            inner = out.pop("not")
            if inner is True or inner == {}:
                _also(out, {"enum": []})
                out["allOf"] = [*out.get("allOf", []), False]
                del out["enum"]
            elif inner is not False:
                self.result.drop("not", "what remains of it in normal form has no complement in the mask")

    def _one_of(self, out: Node) -> None:
        """Exclusive branches: the engine proves it for some; elsewhere at-least-one stays, exactly-one is checked."""
        if "oneOf" in out and "oneOf>anyOf" in self.also_drop:
            self.result.drop("oneOf", "its branches overlap: at least one in the mask, exactly one afterwards")
            _also(out, {"anyOf": out.pop("oneOf")})

    def _property_names(self, out: Node) -> None:
        names = out.pop("propertyNames", None)
        if names is None or names is True or names == {}:
            return
        rest = out.get("additionalProperties", True)
        properties = dict(out.get("properties", {}))
        if (
            isinstance(names, dict)
            and set(names) <= {"enum", "const", "type"}
            and ("enum" in names or "const" in names)
        ):
            known = [name for name in names.get("enum", [names.get("const")]) if isinstance(name, str)]
            if "patternProperties" not in out:
                known_ = self.order.sorted(known)
                out["properties"] = {name: properties.get(name, rest) for name in known_}
                out["additionalProperties"] = False
                return
        if names is False or (isinstance(names, dict) and names.get("not") == {}):
            out["properties"], out["additionalProperties"] = {}, False
            out.pop("patternProperties", None)
            return
        pattern = _pattern_of_names(names)
        if pattern is not None and not properties and "patternProperties" not in out:
            out["patternProperties"], out["additionalProperties"] = {pattern: rest}, False
            return
        self.result.drop("propertyNames", "combined with named properties or a rule that is no pattern")

    def _pattern_properties(self, out: Node) -> None:
        found = out.get("patternProperties")
        if not isinstance(found, dict) or not found:
            out.pop("patternProperties", None)
            return
        sayable = {patterns.for_mask(pattern): value for pattern, value in found.items()}
        if None not in sayable and (len(sayable) == 1 or "patternProperties>loose" not in self.also_drop):
            out["patternProperties"] = dict(sayable)
            return
        self.result.drop("patternProperties", "its patterns overlap, or one has no automaton")
        del out["patternProperties"]
        whole = [patterns.whole(pattern) for pattern in sayable if pattern is not None]
        if out.get("additionalProperties") is False and len(whole) == len(sayable) and None not in whole:
            out["patternProperties"] = {f"^({'|'.join(str(pattern) for pattern in whole)})$": True}
        else:
            out.pop("additionalProperties", None)

    def _min_properties(self, out: Node) -> None:
        """In a closed object with few optional keys a least count is a choice of which of them are there."""
        least, properties = out.get("minProperties"), out.get("properties")
        closed = out.get("additionalProperties") is False and "patternProperties" not in out
        if not closed or not isinstance(properties, dict) or not isinstance(least, int | float):
            return
        required = [name for name in out.get("required", []) if name in properties]
        optional = [name for name, value in properties.items() if name not in required and value is not False]
        missing = int(least) - len(required)
        if missing > 0 and (missing > len(optional) or comb(len(optional), missing) > MOST_BRANCHES):
            return
        del out["minProperties"]
        if missing > 0:
            chosen = [{"required": [*required, *names]} for names in combinations(optional, missing)]
            _also(out, {"anyOf": chosen} if len(chosen) > 1 else {"allOf": chosen})

    def _contains(self, out: Node) -> None:
        """Arrays whose first fitting item stands at place 0, 1, ...; the count itself is checked afterwards."""
        if "contains" not in out:
            return
        wanted = out.pop("contains")
        if "prefixItems" in out or isinstance(out.get("items"), list) or "contains>loose" in self.also_drop:
            self.result.drop("contains", "an array that must hold some item is checked when it closes")
            return
        least = max(int(out.get("minItems", 0)), 1)
        most = out.get("maxItems")
        places = FIRST_PLACES if not isinstance(most, int | float) else min(FIRST_PLACES, int(most))
        item = out.get("items", True)
        branches = [
            {"type": "array", "prefixItems": [*[item] * place, _both(item, wanted)], "items": item}
            | {"minItems": max(least, place + 1)}
            | ({"maxItems": most} if most is not None else {})
            for place in range(places)
        ]
        if out.get("type") != "array" or not branches:
            self.result.drop("contains", "an array that must hold some item is checked when it closes")
            return
        self.result.drop("contains", f"the mask sees to one fitting item among the first {len(branches)}")
        for key in ("items", "minItems", "maxItems", "type"):
            out.pop(key, None)
        _also(out, {"anyOf": branches})

    def _text(self, out: Node) -> None:
        if "pattern" in out:
            pattern = patterns.for_mask(out["pattern"])
            if pattern is None:
                self.result.drop("pattern", "look-around or a back-reference has no automaton")
                del out["pattern"]
            else:
                out["pattern"] = pattern
        if "format" in out:
            pattern = formats.pattern_of(out["format"])
            if pattern is None:
                if formats.known(out["format"]):
                    self.result.drop("format", f"`{out['format']}` is checked when the string closes")
                if out["format"] not in formats.OF_ENGINE:
                    del out["format"]
            else:
                del out["format"]
                _also(out, {"pattern": pattern})

    def _numbers(self, out: Node) -> None:
        for key in COUNTS:
            value = out.get(key)
            if isinstance(value, float) and value.is_integer():
                out[key] = int(value)
        if isinstance(out.get("multipleOf"), int | float) and "multipleOf>loose" in self.also_drop:
            self.result.drop("multipleOf", "a step of so many digits has no small automaton")
            del out["multipleOf"]
        for key in BOUNDS:
            value = out.get(key)
            if isinstance(value, int) and abs(value) > MOST_INTEGER:
                self.result.drop(key, "a number of more than 64 bits is left to the check afterwards")
                del out[key]
        if out.get("minProperties") == 0:
            del out["minProperties"]
        for key in ("maxItems", "maxLength", "maxProperties"):
            if isinstance(out.get(key), int) and out[key] > 1_000_000:
                self.result.drop(key, "so large a count is left to the check afterwards")
                del out[key]


def _also(out: Node, more: Node) -> None:
    """Add keywords; those that are there already are joined through allOf."""
    clash = {key: value for key, value in more.items() if key in out}
    out.update({key: value for key, value in more.items() if key not in clash})
    if clash:
        out["allOf"] = [*out.get("allOf", []), clash]


def _both(first: Any, second: Any) -> Any:
    if first is True or first == {}:
        return second
    return {"allOf": [first, second]}


def _pattern_of_names(names: Any) -> str | None:
    """A rule for property names as one pattern, when it is one."""
    if not isinstance(names, dict) or set(names) - {"type", "pattern", "minLength", "maxLength"}:
        return None
    if names.get("type", "string") != "string":
        return None
    if "pattern" in names:
        return patterns.for_mask(names["pattern"]) if set(names) <= {"type", "pattern"} else None
    least, most = int(names.get("minLength", 0)), names.get("maxLength")
    return f"^(?s:.){{{least},{'' if most is None else int(most)}}}$"
