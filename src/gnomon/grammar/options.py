"""GrammarOptions: the recipe key `grammar:`, the request field, the keyword of model.generate, the command's flag.

Besides the options themselves a Grammar, a Python type, a JSON Schema or (as text) a GBNF grammar is taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, model_validator

from gnomon.errors import GrammarError

if TYPE_CHECKING:
    from gnomon.grammar.grammar import Grammar
    from gnomon.models.tokenizer import Tokenizer

KINDS = ("schema", "regex", "lark", "gbnf", "ebnf", "choices", "structural_tag", "tools")


class ToolCalls(BaseModel):
    """Calls of functions, as the model's family writes them. content: a schema for an answer without a call."""

    model_config = ConfigDict(extra="forbid")

    functions: Annotated[list[dict[str, Any]], Field(min_length=1, description="name, description and parameters.")]
    form: Literal["hermes", "llama3", "gemma", "mistral", "mistral-named"] = "hermes"
    choice: Literal["auto", "required"] = "auto"
    parallel: bool = True
    content: Any = None


class GrammarOptions(BaseModel):
    """What the text must be. Exactly one of schema, regex, lark, gbnf, ebnf, choices, structural_tag and tools."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    json_schema: Annotated[Any, Field(alias="schema", description="A JSON Schema, draft 4 to 2020-12.")] = None
    regex: Annotated[str | None, Field(description="A pattern that the whole text matches.")] = None
    lark: Annotated[str | None, Field(description="A context-free grammar in Lark's notation.")] = None
    gbnf: Annotated[str | None, Field(description="A context-free grammar in llama.cpp's notation.")] = None
    ebnf: Annotated[str | None, Field(description="A context-free grammar in the W3C's EBNF.")] = None
    choices: Annotated[list[str] | None, Field(description="The exact texts allowed.")] = None
    structural_tag: Annotated[
        Any, Field(description="Free text with tags in it that are held to a schema, as vLLM and xgrammar write it.")
    ] = None
    tools: Annotated[ToolCalls | None, Field(description="Calls of functions.")] = None
    whitespace: Annotated[
        Literal["compact", "flexible"], Field(description="JSON without spaces, or with up to two between tokens.")
    ] = "compact"
    any_order: Annotated[bool, Field(description="Keys of objects come in any order, not in the schema's.")] = False
    formats: Annotated[Literal["assert", "annotate"], Field(description="Whether `format` constrains strings.")] = (
        "assert"
    )
    on_length: Annotated[
        Literal["close", "cut"],
        Field(description="At max_tokens: close the text in time, or cut it as other servers do."),
    ] = "close"
    faithful: Annotated[
        bool,
        Field(description="Draw whole texts until one is valid: valid texts keep the model's own distribution."),
    ] = False
    warn_below: Annotated[
        float, Field(ge=0, le=1, description="Warn where the grammar kept less of the model's probability than this.")
    ] = 0.01

    _grammar: Any = PrivateAttr(None)

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        from gnomon.grammar.grammar import Grammar
        from gnomon.grammar.python_types import looks_like_type

        if isinstance(value, str):
            return {"gbnf": value}
        if isinstance(value, Grammar) or looks_like_type(value):
            return {"schema": value}
        if isinstance(value, Mapping) and not _are_options(value):
            kind = "structural_tag" if value.get("type") == "structural_tag" else "schema"
            return {kind: dict(value)}
        return {"schema": value} if isinstance(value, bool) else value

    @model_validator(mode="after")
    def _one_kind(self) -> GrammarOptions:
        given = [name for name in KINDS if getattr(self, "json_schema" if name == "schema" else name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; given: {', '.join(given) or 'none'}")
        return self

    def grammar(self, tokenizer: Tokenizer | None = None) -> Grammar:
        """The compiled grammar, from the cache when it was compiled before. tokenizer: of the model that will write."""
        from gnomon.grammar.cache import compiled

        if self._grammar is None:
            self._grammar = compiled(self, tokenizer)
        found: Grammar = self._grammar
        return found


def _are_options(value: Mapping[str, Any]) -> bool:
    """Whether a mapping holds options rather than a schema: all its keys are options, one of which names a kind."""
    names = {"schema", *GrammarOptions.model_fields}
    return set(value) <= names and any(name in value for name in (*KINDS, "json_schema"))


def parse_text(text: str) -> Any:
    """`--grammar FILE`: the suffix says what it is. .json: a schema or a structural tag; .lark; .gbnf; .ebnf; .txt:
    choices, one a line."""
    if text.lstrip()[:1] == "{":
        return _as_tag(parse_schema(text)["schema"])
    path = Path(text)
    kinds = {".json": "schema", ".lark": "lark", ".gbnf": "gbnf", ".ebnf": "ebnf", ".txt": "choices"}
    kind = kinds.get(path.suffix)
    if kind is None:
        raise GrammarError(
            f"--grammar {text}: not a file whose suffix says what it is ({', '.join(kinds)}).",
            hint="Or use --schema FILE, --regex PATTERN, --choices A,B.",
            param="grammar",
        )
    read = _read(path, kind)
    return _as_tag(read) if kind == "schema" else {kind: read}


def _as_tag(value: Any) -> dict[str, Any]:
    """A JSON value as what it is: a structural tag says so."""
    tagged = isinstance(value, Mapping) and value.get("type") == "structural_tag"
    return {"structural_tag" if tagged else "schema": value}


def parse_schema(text: str) -> Any:
    """`--schema FILE`, or the schema itself."""
    import json

    raw = text if text.lstrip()[:1] == "{" else _text_of(Path(text))
    try:
        return {"schema": json.loads(raw)}
    except ValueError as error:
        raise GrammarError(f"--schema: not JSON: {error}.", param="schema") from None


def parse_regex(text: str) -> Any:
    return {"regex": text}


def parse_choices(text: str) -> Any:
    """`--choices a,b,c`."""
    return {"choices": [choice.strip() for choice in text.split(",") if choice.strip()]}


def _read(path: Path, kind: str) -> Any:
    text = _text_of(path)
    if kind == "schema":
        return parse_schema(text)["schema"] if text.lstrip()[:1] == "{" else text
    if kind == "choices":
        return [line for line in text.splitlines() if line]
    return text


def _text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise GrammarError(f"{path}: {reason}.", param="grammar") from None
