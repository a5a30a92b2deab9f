"""Python types as schemas: pydantic models, dataclasses, TypedDicts, Enums, Literals, unions, containers.

Out: the JSON Schema, and a function that turns a JSON value into the type.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import PydanticSchemaGenerationError, PydanticUserError, TypeAdapter

from gnomon.errors import GrammarError


def schema_of_type(kind: Any) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Raises GrammarError for a type that has no JSON form. Objects are closed: no key that the type does not name."""
    try:
        adapter = TypeAdapter(kind)
        schema = adapter.json_schema()
    except (PydanticSchemaGenerationError, PydanticUserError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise GrammarError(f"The type {kind!r} cannot be written as JSON: {reason}", param="type") from None
    return _closed(schema), adapter.validate_python


def _closed(schema: Any) -> Any:
    """Objects that list their properties and say nothing of others take no others."""
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    made = {
        key: value if key in ("enum", "const", "default", "examples") else _closed(value)
        for key, value in schema.items()
    }
    if made.get("type") == "object" and isinstance(made.get("properties"), dict):
        made.setdefault("additionalProperties", False)
    return made


def looks_like_type(value: Any) -> bool:
    """Whether a Python value is a type that a grammar can be made of, rather than a schema or text."""
    return not isinstance(value, dict | list | tuple | str | bool | int | float | bytes) and value is not None
