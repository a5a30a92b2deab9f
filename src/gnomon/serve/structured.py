"""Request fields that constrain the answer -> the `grammar` option: response_format and other servers' spellings.

OpenAI's response_format (text, json_object, json_schema), vLLM's structural_tag, structured_outputs and guided_*,
SGLang's json_schema, regex and ebnf. `grammar` itself is the registry's. Raises UsageError in OpenAI's words where
OpenAI has some.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from gnomon.errors import GrammarError, UsageError
from gnomon.generation import Outcome
from gnomon.grammar.options import GrammarOptions
from gnomon.serve.strict import Profile, strict_fault

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
ALIASES = {
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_choice": "choices",
    "guided_grammar": "gbnf",
    "json_schema": "schema",
    "regex": "regex",
    "ebnf": "gbnf",
    "structural_tag": "structural_tag",
}
STRUCTURED_OUTPUTS = {
    "json": "schema",
    "regex": "regex",
    "choice": "choices",
    "grammar": "gbnf",
    "structural_tag": "structural_tag",
}


class SchemaRefused(UsageError):
    """A schema that cannot be used, in OpenAI's shape."""

    def __init__(self, message: str, *, param: str, code: str | None) -> None:
        super().__init__(message, param=param)
        self.code = code  # type: ignore[assignment]


def take_constraint(extra: dict[str, Any], response_format: Any, profile: Profile) -> dict[str, Any] | None:
    """The grammar options that a body asks for, its aliases taken out of `extra`; None: it asks for none."""
    found: list[tuple[str, dict[str, Any]]] = []
    if (wanted := _of_response_format(response_format, profile)) is not None:
        found.append(("response_format", wanted))
    for alias, kind in ALIASES.items():
        if (value := extra.pop(alias, None)) is not None:
            found.append((alias, {kind: value}))
    if (outputs := extra.pop("structured_outputs", None)) is not None:
        found.append(("structured_outputs", _of_structured_outputs(outputs)))
    if extra.get("grammar") is not None:
        found.append(("grammar", {}))
    if len(found) > 1:
        both = " and ".join(f"`{name}`" for name, _ in found[:2])
        raise UsageError(f"{both} both say what the answer must be.", hint="Give one of them.", param=found[1][0])
    return found[0][1] if found and found[0][1] else None


def _of_response_format(given: Any, profile: Profile) -> dict[str, Any] | None:
    if given is None:
        return None
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"schema": {"type": "object"}}
    if kind == "structural_tag":
        return {"structural_tag": dict(given)}
    if kind != "json_schema":
        raise UsageError(
            f"`response_format.type` is {kind!r}; known: text, json_object, json_schema, structural_tag.",
            param="response_format.type",
        )
    described = given.get("json_schema")
    if not isinstance(described, Mapping):
        raise UsageError(
            "Missing required parameter: 'response_format.json_schema'.", param="response_format.json_schema"
        )
    name = described.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(
            "`response_format.json_schema.name` is needed: up to 64 letters, digits, _ and -.",
            param="response_format.json_schema.name",
        )
    schema = described.get("schema", {"type": "object"})
    if described.get("strict") and (fault := strict_fault(schema, profile)) is not None:
        raise SchemaRefused(f"Invalid schema for response_format '{name}': {fault}", param="response_format", code=None)
    options = {"schema": schema}
    try:
        compiled = GrammarOptions.model_validate(options).grammar()
    except GrammarError as error:
        raise SchemaRefused(
            f"Invalid schema for response_format '{name}': {error.message}", param="response_format", code=None
        ) from None
    if compiled.unsatisfiable:
        raise SchemaRefused(
            f"Invalid schema for response_format '{name}': no text satisfies it.", param="response_format", code=None
        )
    return options


def _of_structured_outputs(given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise UsageError("`structured_outputs` must be an object.", param="structured_outputs")
    options = {STRUCTURED_OUTPUTS[key]: value for key, value in given.items() if key in STRUCTURED_OUTPUTS}
    unknown = next((key for key in given if key not in STRUCTURED_OUTPUTS), None)
    if unknown is not None or len(options) != 1:
        raise UsageError(
            f"`structured_outputs` takes one of {', '.join(STRUCTURED_OUTPUTS)}.",
            param=f"structured_outputs.{unknown}" if unknown else "structured_outputs",
        )
    return options


def grammar_usage(outcomes: Sequence[Outcome | None]) -> dict[str, Any]:
    """What the constraint cost, for the usage block; nothing without one."""
    made = [outcome for outcome in outcomes if outcome is not None]
    if not made:
        return {}
    mass = [value for outcome in made if outcome.trace for value in outcome.trace.kept_mass]
    kept = {"mean": sum(mass) / len(mass), "least": min(mass)} if mass else None
    warnings = list(dict.fromkeys(warning for outcome in made for warning in outcome.warnings))
    return {
        "grammar": {
            "completed": all(outcome.completed for outcome in made),
            "kept_mass": kept,
            "rollbacks": sum(outcome.trace.rollbacks for outcome in made if outcome.trace),
            "warnings": warnings,
        }
    }
