"""What OpenAI's strict mode allows of a schema, and its error messages word for word.

Profiles: "openai" (limits documented in 2026), "openai-2024" (100 properties, 5 levels), "open" (everything that can be
enforced: no check here). Knows schemas, nothing of HTTP.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Profile = Literal["open", "openai", "openai-2024"]
NOT_PERMITTED = ("allOf", "oneOf", "not", "dependentRequired", "dependentSchemas", "if", "then", "else")
MOST_CHARACTERS = 120_000
MOST_ENUM = 1_000
LONG_ENUM = 250
LONG_ENUM_CHARACTERS = 15_000
Context = tuple[str, ...]


@dataclass(frozen=True)
class Limits:
    """properties: in the whole schema; levels: of nested objects and arrays."""

    properties: int
    levels: int


LIMITS: Mapping[str, Limits] = {"openai": Limits(5_000, 10), "openai-2024": Limits(100, 5)}


def strict_fault(schema: Any, profile: Profile) -> str | None:
    """Why strict mode refuses a schema ("In context=(...), ..."), or None."""
    if profile == "open":
        return None
    if not isinstance(schema, Mapping) or schema.get("type") != "object":
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        if kind is None:
            return "schema must have a 'type' key."
        return f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{kind}\"'."
    for context, node in _nodes(schema, ()):
        if (fault := _fault_of(node)) is not None:
            return f"In context={context!r}, {fault}"
    return _beyond(schema, LIMITS[profile])


def _fault_of(node: Mapping[str, Any]) -> str | None:
    for keyword in NOT_PERMITTED:
        if keyword in node:
            return f"'{keyword}' is not permitted."
    if node.get("type") != "object" and "properties" not in node:
        return None
    if node.get("additionalProperties") is not False:
        return "'additionalProperties' is required to be supplied and to be false."
    names, required = list(node.get("properties", {})), node.get("required")
    listed = required if isinstance(required, list) else []
    missing = next((name for name in names if name not in listed), None)
    if missing is not None:
        return (
            "'required' is required to be supplied and to be an array including every key in properties. "
            f"Missing '{missing}'."
        )
    extra = next((name for name in listed if name not in names), None)
    return f"Extra required key '{extra}' supplied." if extra is not None else None


def _nodes(schema: Any, context: Context) -> Iterator[tuple[Context, Mapping[str, Any]]]:
    """Every subschema with its path, as OpenAI writes it: a tuple of keys."""
    if not isinstance(schema, Mapping):
        return
    yield context, schema
    for keyword in ("properties", "$defs", "definitions"):
        if isinstance(found := schema.get(keyword), Mapping):
            for name, item in found.items():
                yield from _nodes(item, (*context, keyword, str(name)))
    if isinstance(items := schema.get("items"), Mapping):
        yield from _nodes(items, (*context, "items"))
    if isinstance(branches := schema.get("anyOf"), list):
        for place, item in enumerate(branches):
            yield from _nodes(item, (*context, "anyOf", str(place)))


def _beyond(schema: Mapping[str, Any], limits: Limits) -> str | None:
    """The limits on size, in words of ours."""
    properties = characters = values = 0
    for context, node in _nodes(schema, ()):
        names = [*node.get("properties", {}), *node.get("$defs", {})]
        properties += len(node.get("properties", {}))
        texts = [value for value in [*node.get("enum", []), node.get("const")] if isinstance(value, str)]
        characters += sum(map(len, [*names, *texts]))
        values += len(node.get("enum", []))
        if len(node.get("enum", [])) > LONG_ENUM and sum(map(len, texts)) > LONG_ENUM_CHARACTERS:
            return f"In context={context!r}, an enum of more than {LONG_ENUM} values is too long."
        levels = sum(step in ("properties", "items") for step in context[::1]) + 1
        if levels > limits.levels + 1:
            return f"In context={context!r}, {limits.levels} levels of nesting are exceeded."
    if properties > limits.properties:
        return f"In context=(), {properties} properties exceed the limit of {limits.properties}."
    if characters > MOST_CHARACTERS or values > MOST_ENUM:
        return "In context=(), names and enum values exceed the limits."
    return None
