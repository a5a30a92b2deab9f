"""The reference verdict on values, and which parts of the schema certainly speak about which place of a value.

Stands on jsonschema-rs: linear-time patterns where it can, bounded backtracking elsewhere, never the network. A place
is certain when the schema reaches it through properties, items, allOf and local references alone; what lies behind
anyOf, not, if, ... is judged with the nearest certain value around it. Knows values, not texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import jsonschema_rs

from gnomon.errors import GrammarError
from gnomon.grammar.report import Entry
from gnomon.grammar.schema.bounds import escape

BACKTRACKS = 100_000
PATTERN_BYTES = 10_000_000
PATTERN_ENGINES = (
    jsonschema_rs.RegexOptions(size_limit=PATTERN_BYTES, dfa_size_limit=PATTERN_BYTES),
    jsonschema_rs.FancyRegexOptions(backtrack_limit=BACKTRACKS, size_limit=PATTERN_BYTES, dfa_size_limit=PATTERN_BYTES),
)
"""Of linear time where it can read the pattern, else of bounded backtracking."""
MOST_STEPS = 64
"""References and allOf that are followed at one place."""
_UNCERTAIN = frozenset(
    [
        "anyOf",
        "oneOf",
        "not",
        "if",
        "then",
        "else",
        "contains",
        "dependentSchemas",
        "dependencies",
        "propertyNames",
        "unevaluatedItems",
        "unevaluatedProperties",
        "patternProperties",
    ]
)
Step = str | int


class Validators:
    """One schema's validators: of the whole, and of each certain place that something is left to check at. They are
    built when a value first has to be judged."""

    def __init__(self, schema: Any, documents: Mapping[str, Any] | None, assert_formats: bool) -> None:
        """documents: that references may name, by URI."""
        self.schema = schema
        self._documents = documents
        self._assert_formats = assert_formats
        self.watched: frozenset[str] = frozenset()
        self.monotone: frozenset[str] = frozenset()
        self.names: frozenset[str] = frozenset()

    @classmethod
    def registry(cls, documents: Mapping[str, Any] | None) -> Any:
        return jsonschema_rs.Registry(list(documents.items())) if documents else None

    @property
    def whole(self) -> Any:
        """Raises GrammarError, with the place, for a schema that is none."""
        return self._built[0]

    @cached_property
    def _built(self) -> tuple[Any, Mapping[str, Any]]:
        """(validator of the whole, options that it took)."""
        options: dict[str, Any] = {
            "registry": self.registry(self._documents),
            "validate_formats": self._assert_formats,
            "offline": True,
        }
        failure: Exception | None = None
        for engine in PATTERN_ENGINES:
            options["pattern_options"] = engine
            try:
                return jsonschema_rs.validator_for(self.schema, **options), options
            except jsonschema_rs.ValidationError as error:
                failure = error
                if error.kind.name not in ("pattern", "format"):
                    break
            except (jsonschema_rs.ReferencingError, ValueError) as error:
                failure = error
                break
        raise _explained(failure, self.schema)

    def accepts(self, value: Any) -> bool:
        return bool(self.whole.is_valid(value))

    def fault(self, value: Any) -> str:
        """Why a value is wrong, and where; "" when it is right."""
        for error in self.whole.iter_errors(value):
            place = "".join(f"/{step}" for step in error.instance_path)
            return f"{error.message} (at {place or 'the root'})"
        return ""

    def watch(self, left: Sequence[Entry]) -> None:
        """Note the places where something is left to check."""
        places = [(entry.path, entry.keyword) for entry in left if entry.status == "post-validated"]
        self.watched = frozenset(_certain_part(path, keyword) for path, keyword in places)
        self.monotone = frozenset(path for path, keyword in places if keyword == "uniqueItems")
        self.names = frozenset(path for path, keyword in places if keyword == "propertyNames")

    def schemas_at(self, path: Sequence[Step]) -> frozenset[str]:
        """Pointers of the certain schemas for a place of the value."""
        here = self.expanded(["#"])
        for step in path:
            if not here:
                break
            here = self.expanded([pointer for at in here for pointer in self._children(at, step)])
        return here

    def below(self, here: frozenset[str], step: Step) -> frozenset[str]:
        """The certain schemas one step further down."""
        return self.expanded([pointer for at in here for pointer in self._children(at, step)])

    @cached_property
    def root(self) -> frozenset[str]:
        return self.expanded(["#"])

    def name_fault(self, here: frozenset[str], name: str) -> str:
        """Why a key may not stand in an object of these certain schemas; "" when it may."""
        for pointer in here & self.names:
            validator = self.validator(f"{pointer}/propertyNames")
            if validator is not None and not validator.is_valid(name):
                return f"the key {name!r} is not valid at {pointer}/propertyNames"
        return ""

    def validator(self, pointer: str) -> Any | None:
        return self._map.get(pointer)

    @cached_property
    def _map(self) -> Any:
        return jsonschema_rs.validator_map_for(self.schema, **self._built[1])

    def at(self, pointer: str) -> Any:
        """What stands at a place of the schema."""
        value = self.schema
        for step in pointer[2:].split("/") if len(pointer) > 1 else []:
            key = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, list):
                value = value[int(key)] if key.isdigit() and int(key) < len(value) else None
            else:
                value = value.get(key) if isinstance(value, Mapping) else None
        return value

    def expanded(self, pointers: Iterable[str]) -> frozenset[str]:
        """With everything that allOf and local references add at the same place."""
        found: set[str] = set()
        queue = list(pointers)
        while queue and len(found) < MOST_STEPS:
            pointer = queue.pop()
            schema = self.at(pointer)
            if pointer in found or not isinstance(schema, Mapping) or ("$id" in schema and pointer != "#"):
                continue
            found.add(pointer)
            reference = schema.get("$ref")
            if isinstance(reference, str) and (reference == "#" or reference.startswith("#/")) and "%" not in reference:
                queue.append(reference)
            if isinstance(schema.get("allOf"), list):
                queue += [f"{pointer}/allOf/{place}" for place in range(len(schema["allOf"]))]
        return frozenset(found)

    def _children(self, pointer: str, step: Step) -> list[str]:
        schema = self.at(pointer)
        if isinstance(step, int):
            items, prefix = schema.get("items"), schema.get("prefixItems")
            if isinstance(items, list):
                return [f"{pointer}/items/{step}"] if step < len(items) else [f"{pointer}/additionalItems"]
            if isinstance(prefix, list) and step < len(prefix):
                return [f"{pointer}/prefixItems/{step}"]
            return [f"{pointer}/items"]
        properties = schema.get("properties")
        if isinstance(properties, Mapping) and step in properties:
            return [f"{pointer}/properties/{escape(step)}"]
        return [] if schema.get("patternProperties") else [f"{pointer}/additionalProperties"]


def _certain_part(path: str, keyword: str) -> str:
    """The innermost certain schema around a keyword: everything from the first uncertain step on is cut off."""
    steps = path.split("/")
    named = False
    for place, step in enumerate(steps):
        if named:  # a name in a map of schemas, whatever it looks like
            named = False
        elif step in _UNCERTAIN:
            return "/".join(steps[:place])
        else:
            named = step in ("properties", "$defs", "definitions")
    return path


def _explained(error: Exception | None, schema: Any) -> GrammarError:
    message = str(error).splitlines()[0] if error is not None else "unknown error"
    kind = error.kind.name if isinstance(error, jsonschema_rs.ValidationError) else ""
    if isinstance(error, jsonschema_rs.ReferencingError) or kind.lower() in ("referencing", "$ref"):
        place = _reference_in(message, schema)
        return GrammarError(
            f"The reference at {place} leads nowhere: {message[:200]}.",
            hint="A schema may only refer to itself and to documents given along; nothing is fetched.",
            param="schema",
        )
    if isinstance(error, jsonschema_rs.ValidationError):
        place = "#" + "".join(f"/{escape(str(step))}" for step in error.instance_path)
        too_large = "Or one that grows too large: repetitions within repetitions multiply."
        hint = too_large if place.endswith("/pattern") and isinstance(error.instance, str) else None
        return GrammarError(f"The schema is wrong at {place}: {error.message[:300]}", hint=hint, param="schema")
    return GrammarError(f"The schema cannot be used: {message[:300]}", param="schema")


def _reference_in(message: str, schema: Any) -> str:
    """Where the reference stands that a message speaks of; the root when it is not found."""
    stack: list[tuple[Any, str]] = [(schema, "#")]
    while stack:
        value, path = stack.pop()
        if isinstance(value, Mapping):
            target = value.get("$ref")
            if isinstance(target, str) and (target.split("#")[0] or target.lstrip("#")) in message:
                return f"{path}/$ref"
            stack.extend((item, f"{path}/{escape(key)}") for key, item in value.items())
        elif isinstance(value, list):
            stack.extend((item, f"{path}/{place}") for place, item in enumerate(value))
    return "#"
