"""One schema compiled: the mask grammar by the first route that the engine takes, and what it leaves to be checked.

Routes, from the most to the least exact: "as written"; "normal form" (negation, conditions, exclusive branches and
unevaluated members multiplied out by jsonschema-rs's canonical form); "relaxed" (keywords dropped from the mask,
checked afterwards); "any JSON". All but the first are wider than the schema or equal to it, never narrower in what
they accept of a value, except for the order of keys and the spelling of numbers and strings.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jsonschema_rs
from llguidance import LLMatcher

from gnomon.errors import GrammarError
from gnomon.grammar.matcher import Matcher
from gnomon.grammar.report import Entry, Report, Status
from gnomon.grammar.schema import formats
from gnomon.grammar.schema.bounds import checked, draft_of, escape
from gnomon.grammar.schema.lowering import SILENT, Lowered, NameOrder, lower
from gnomon.grammar.schema.reordering import any_order as set_free
from gnomon.grammar.schema.reordering import has_order
from gnomon.grammar.schema.validators import Validators
from gnomon.grammar.vocabulary import Vocabulary, byte_vocabulary

COMPACT = {"whitespace_flexible": False}
LOOSE = ("oneOf>anyOf", "contains>loose", "patternProperties>loose", "multipleOf>loose")
GIVE_UP = (
    LOOSE,
    ("minProperties", "maxProperties"),
    ("not", "contains", "multipleOf"),
    ("propertyNames", "patternProperties"),
)
"""What a mask gives up, step by step, until the engine takes it."""
OLD_DRAFTS = ("draft 4", "draft 6", "draft 7")
DROPPED_AS = {
    "if": ("then", "else"),
    "minContains": ("contains",),
    "maxContains": ("contains",),
    "propertyNames": ("propertyNames", "unevaluatedProperties"),
}
_DEFINING = frozenset(["$schema", "$id", "id", "$anchor", "$defs", "definitions", "$ref"])
_MAPS = ("properties", "patternProperties", "dependentSchemas", "$defs", "definitions", "dependencies")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_ONE = (
    "items",
    "additionalItems",
    "additionalProperties",
    "not",
    "if",
    "then",
    "else",
    "contains",
    "propertyNames",
    "unevaluatedItems",
    "unevaluatedProperties",
)


@dataclass(frozen=True)
class Compiled:
    """grammar: for the mask engine; lowered: the schema it says. report: makes the report. validators: of the schema as
    written. matcher: a walk at the grammar's beginning."""

    grammar: str
    report: Callable[[], Report]
    validators: Validators
    lowered: Any = False
    matcher: Matcher | None = None
    unsatisfiable: bool = False


def compile_schema(
    schema: Any,
    *,
    registry: Mapping[str, Any] | None = None,
    assert_formats: bool = True,
    spaces: str | None = None,
    vocabulary: Vocabulary | None = None,
    any_order: bool = False,
) -> Compiled:
    """Raises GrammarError for a schema that is wrong, too large, or refers to what is not there.

    spaces: a pattern of the whitespace that may stand between tokens of JSON; None: none. vocabulary: over which the
    grammar is tried; None: bytes. any_order: keys may come in any order.
    """
    written = checked(schema)
    draft = draft_of(written)
    validators = Validators(written, registry, assert_formats)
    options = COMPACT if spaces is None else {"whitespace_flexible": True, "whitespace_pattern": spaces}
    normal = _canonical(written, registry, assert_formats)
    if normal is None:
        assert validators.whole is not None  # what is wrong with a schema that has no normal form, it says
    satisfiable = jsonschema_rs.canonical.Satisfiability.UNKNOWN if normal is None else normal.satisfiability()
    if satisfiable == jsonschema_rs.canonical.Satisfiability.NO:
        return _unsatisfiable(written, draft, "", validators)
    order = NameOrder(written)
    failures: list[str] = []
    for route, lowered in _routes(written, normal, order, draft in OLD_DRAFTS):
        try:
            grammar = _grammar(lowered.schema, options)
            matcher = Matcher(vocabulary or byte_vocabulary(), grammar)
            free, kept = reordered(lowered.schema, spaces, matcher.vocabulary) if any_order else (None, ())
        except GrammarError as error:
            failures.append(f"{route}: {error.message}")
            # The engine says so of a branch that nobody has to take, too: the normal form, where sure, knows better.
            sure = satisfiable == jsonschema_rs.canonical.Satisfiability.YES
            if "Unsatisfiable schema" in error.message and not sure:
                return _unsatisfiable(written, draft, route, validators)
            continue
        dropped = {name: why for key, why in lowered.dropped.items() for name in DROPPED_AS.get(key, (key,))}
        if route != "as written" and dropped:
            dropped = _spread(dropped)
        if free is not None:
            grammar, matcher = free.grammar, free
        report = partial(_report, written, draft, route, dropped, kept)
        if dropped:
            validators.watch(entries_of(written, dropped, only=dropped))
        return Compiled(grammar, report, validators, lowered.schema, matcher)
    raise GrammarError("No grammar could be made of this schema. " + " ".join(failures[-2:]), param="schema")


def _unsatisfiable(written: Any, draft: str, route: str, validators: Validators) -> Compiled:
    report = Report("schema", entries_of(written, {}), draft, route, unsatisfiable=True)
    return Compiled("", lambda: report, validators, unsatisfiable=True)


def reordered(schema: Any, spaces: str | None, vocabulary: Vocabulary) -> tuple[Matcher | None, tuple[str, ...]]:
    """(a walk through the grammar with its keys set free, where there is one; paths of objects that keep theirs)."""
    free = set_free(schema, spaces)
    if free is None:
        return None, ("#",) if has_order(schema) else ()
    try:
        mask = str(LLMatcher.grammar_from_lark(free.lark))
        return Matcher(vocabulary, mask), free.kept
    except GrammarError:
        return None, ("#",)


def _report(written: Any, draft: str, route: str, dropped: Mapping[str, str], kept: Sequence[str]) -> Report:
    warnings: tuple[str, ...] = ()
    if kept:
        places = ", ".join(kept[:8]) + (", ..." if len(kept) > 8 else "")
        warnings = (f"Keys come in the schema's order, not in any, in what stands at {places}.",)
    warnings += () if draft != "a dialect of its own" else ("`$schema` names no known draft: read as 2020-12.",)
    return Report("schema", entries_of(written, dropped), draft, route, warnings=warnings)


def _routes(written: Any, canonical: Any, order: NameOrder, old: bool) -> Iterator[tuple[str, Lowered]]:
    """Candidates for the mask, best first; computed one by one."""
    as_written = lower(written, order=order, old=old)
    if not as_written.dropped:
        yield "as written", as_written
    normal = canonical.to_json_schema() if canonical is not None else None
    given_up: frozenset[str] = frozenset()
    for more in ((), *GIVE_UP):
        given_up |= frozenset(more)
        routes = []
        if normal is not None:
            routes.append(("normal form", lower(normal, order=order, reorder=True, also_drop=given_up)))
            if not routes[0][1].dropped:
                yield routes.pop()
        routes.append(("relaxed", lower(written, order=order, also_drop=given_up, old=old)))
        yield from sorted(routes, key=lambda route: len(route[1].dropped))
    whole = Lowered(_type_only(written))
    for keyword in _keywords(written):
        whole.drop(keyword, "this schema has no mask of its own: any JSON of its type, checked as it grows")
    yield "any JSON", whole


def _type_only(schema: Any) -> Any:
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    return {"type": kind} if kind is not None else {}


def _spread(dropped: dict[str, str]) -> dict[str, str]:
    """In normal form a keyword may have become another: what could stand behind a dropped one is checked as well."""
    kin = {
        "not": ("not", "oneOf", "if", "then", "else", "unevaluatedProperties", "unevaluatedItems", "dependentSchemas"),
        "contains": ("contains", "minContains", "maxContains", "unevaluatedItems", "not", "if"),
        "propertyNames": ("propertyNames", "unevaluatedProperties", "additionalProperties", "not", "if", "then"),
        "patternProperties": ("patternProperties", "additionalProperties", "unevaluatedProperties", "propertyNames"),
        "oneOf": ("oneOf", "if", "not"),
        "allOf": ("allOf",),
        "uniqueItems": ("uniqueItems", "enum"),
    }
    return {name: why for key, why in dropped.items() for name in (key, *kin.get(key, ()))}


def _grammar(schema: Any, options: Mapping[str, Any]) -> str:
    if schema is False:
        raise GrammarError("Unsatisfiable schema: false")
    try:
        return str(LLMatcher.grammar_from_json_schema({} if schema is True else schema, overrides=dict(options)))  # type: ignore[arg-type]
    except ValueError as error:  # a number of more than 64 bits: the routes after this one say less of it
        raise GrammarError(str(error)) from None


def _canonical(schema: Any, registry: Mapping[str, Any] | None, assert_formats: bool) -> Any:
    """The normal form, or None where the library has none."""
    try:
        made = jsonschema_rs.canonicalize(
            schema, registry=Validators.registry(registry), validate_formats=assert_formats, offline=True
        )
    except (jsonschema_rs.ValidationError, jsonschema_rs.ReferencingError, ValueError):
        return None
    return None if made.kind == jsonschema_rs.canonical.CanonicalKind.RAW else made


def _keywords(schema: Any) -> set[str]:
    return {keyword for _, keyword, _ in _walk(schema, "#")}


def entries_of(written: Any, dropped: Mapping[str, str], only: Container[str] | None = None) -> tuple[Entry, ...]:
    """The report's lines. dropped: what the mask does not say, and why; only: some keywords' lines."""
    return tuple(
        _entry(path, keyword, value, dropped)
        for path, keyword, value in _walk(written, "#")
        if only is None or keyword in only
    )


def _entry(path: str, keyword: str, value: Any, dropped: Mapping[str, str]) -> Entry:
    status: Status = "enforced"
    note = ""
    if keyword in SILENT:
        status = "annotation"
    elif keyword == "format" and not formats.known(value):
        status, note = "annotation", f"no rule is known for `{value}`"
    elif keyword not in KNOWN:
        status, note = "annotation", "no keyword of JSON Schema"
    elif keyword in dropped:
        status, note = "post-validated", dropped[keyword]
    return Entry(path, keyword, status, note)


KNOWN = frozenset(
    [
        "type",
        "enum",
        "const",
        "properties",
        "patternProperties",
        "additionalProperties",
        "required",
        "minProperties",
        "maxProperties",
        "propertyNames",
        "dependentRequired",
        "dependentSchemas",
        "dependencies",
        "unevaluatedProperties",
        "items",
        "prefixItems",
        "additionalItems",
        "contains",
        "minContains",
        "maxContains",
        "minItems",
        "maxItems",
        "uniqueItems",
        "unevaluatedItems",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "allOf",
        "anyOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
        "$ref",
        "$dynamicRef",
        "$recursiveRef",
    ]
)


def _walk(schema: Any, path: str) -> Iterator[tuple[str, str, Any]]:
    """(path of the schema, keyword, value) for every keyword of every subschema."""
    if not isinstance(schema, Mapping):
        return
    for keyword, value in schema.items():
        if keyword not in _DEFINING or keyword == "$ref":
            yield path, keyword, value
        below = f"{path}/{escape(keyword)}"
        if keyword in _MAPS and isinstance(value, Mapping):
            for name, item in value.items():
                yield from _walk(item, f"{below}/{escape(name)}")
        elif keyword in _LISTS and isinstance(value, list):
            for place, item in enumerate(value):
                yield from _walk(item, f"{below}/{place}")
        elif keyword in _ONE:
            yield from _walk(value, below)
