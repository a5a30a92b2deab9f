"""Tool calls as a grammar: functions and their schemas in, a Grammar whose texts are free text, calls, or both.

A custom tool takes text in place of arguments: any, of a pattern, or of a Lark grammar.
How a model writes calls, and how they are read again, is in `calls.py`. Knows nothing of HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gnomon.errors import GrammarError
from gnomon.grammar.calls import Call, CallForm, CallReader
from gnomon.grammar.compiling import compile as compile_grammar
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.matcher import Matcher
from gnomon.grammar.report import Report
from gnomon.grammar.schema.build import Compiled, compile_schema
from gnomon.grammar.schema.patterns import escaped, for_mask
from gnomon.grammar.schema.reading import load
from gnomon.grammar.schema.validators import Validators
from gnomon.grammar.vocabulary import byte_vocabulary

Choice = Literal["auto", "required"]
NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
SPACED = {"item_separator": ", ", "key_separator": ": ", "whitespace_flexible": False}
"""JSON as the templates' own examples write it."""


def tool_grammar(
    tools: Sequence[Mapping[str, Any]], form: CallForm, *, choice: Choice, parallel: bool, content: Any = None
) -> Grammar:
    """A Grammar of calls. tools: {"name", "parameters"} each. content: a schema for the text where no call is made.

    Raises GrammarError; its param names the tool at fault by place.
    """
    compiled: dict[str, Compiled | Custom] = {}
    for place, tool in enumerate(tools):
        made = custom_tool(place, tool["custom"], form) if "custom" in tool else _arguments(place, tool)
        compiled[str(tool["name"])] = made
    if not compiled:
        raise GrammarError("There are no tools to call.", param="tools")
    said = _compiled_content(content)
    if said is not None and choice == "auto" and form.marker.startswith("{"):
        raise GrammarError(
            "This model writes a call as a bare JSON object, so a call and a structured answer cannot be told apart.",
            hint='Use tool_choice "required" or "none", or leave response_format out.',
            param="response_format",
        )
    lark = _lark(compiled, form, choice, parallel and form.several, said)
    parts = [{"name": "main", "lark_grammar": lark}]
    for place, one in enumerate(compiled.values()):
        if isinstance(one, Custom) and one.lark is not None:
            parts.append({"name": f"custom_{place}", "lark_grammar": one.lark})
    mask = json.dumps({"grammars": parts})
    Matcher(byte_vocabulary(), mask)
    takes = {name: one.grammar if isinstance(one, Custom) else one.validators for name, one in compiled.items()}
    checks = CallChecks(takes, form, said.validators if said else None)
    source = [dict(tool) for tool in tools]
    return Grammar(mask, Report("tools"), checks=checks, source=source, controls=form.controls)


@dataclass(frozen=True)
class Custom:
    """What a custom tool's text must be. grammar: judges it, None: any text does. lark, regex: for the mask."""

    grammar: Grammar | None
    lark: str | None = None
    regex: str | None = None


def custom_tool(place: int, given: Any, form: CallForm) -> Custom:
    """given: OpenAI's `format`: {"type": "text"}, or {"type": "grammar", "grammar": {"syntax", "definition"}}."""
    where = f"tools[{place}].custom.format"
    if not form.custom_head:
        raise GrammarError("This model writes calls with JSON arguments alone: it has no custom tools.", param=where)
    kind = given.get("type", "text") if isinstance(given, Mapping) else None
    if kind == "text":
        return Custom(None)
    described = given.get("grammar") if kind == "grammar" else None
    syntax = described.get("syntax") if isinstance(described, Mapping) else None
    if not isinstance(described, Mapping) or syntax not in ("lark", "regex"):
        raise GrammarError(
            'A custom tool\'s `format` is {"type": "text"}, or of type "grammar" with `syntax` "lark" or "regex" and a '
            "`definition`.",
            param=where,
        )
    definition = described.get("definition")
    try:
        if syntax == "lark":
            return Custom(compile_grammar(lark=definition), lark=definition)
        return Custom(compile_grammar(regex=definition), regex=for_mask(definition, whole=True))
    except GrammarError as error:
        raise GrammarError(error.message, hint=error.hint, param=where) from None


def _arguments(place: int, tool: Mapping[str, Any]) -> Compiled:
    schema = tool.get("parameters")
    try:
        compiled = compile_schema(NO_PARAMETERS if schema is None else schema)
    except GrammarError as error:
        raise GrammarError(error.message, hint=error.hint, param=f"tools[{place}]") from None
    if compiled.unsatisfiable:
        raise GrammarError(f"No arguments satisfy the schema of `{tool['name']}`.", param=f"tools[{place}]")
    return compiled


def _compiled_content(schema: Any) -> Compiled | None:
    if schema is None:
        return None
    compiled = compile_schema(schema)
    if compiled.unsatisfiable:
        raise GrammarError("No text satisfies the schema of the response.", param="response_format")
    return compiled


def _lark(
    compiled: Mapping[str, Compiled | Custom], form: CallForm, choice: Choice, several: bool, content: Compiled | None
) -> str:
    lines = []
    more = f" ({_literal(form.between)} call)*" if several else ""
    calls = "call" + more
    if choice == "required":
        lines.append(f"start: {calls}")
    elif content is not None:
        lines.append(f"start: {calls} | said")
        said = content.lowered if isinstance(content.lowered, dict) else {}
        lines.append(f"said: %json {json.dumps({**said, 'x-guidance': {'whitespace_flexible': False}})}")
    elif form.marker.startswith("{"):
        lines.append(f"start: {calls} | PLAIN")
        lines.append("PLAIN: /[^{\\s](.|\\n)*/")
    else:
        lines.append(f"start: PLAIN | opened{more}")
        lines.append(f"PLAIN: ANY & ~/(.|\\n)*{escaped(form.marker)}(.|\\n)*/")
        lines.append("opened: " + " | ".join(f"opened_{place}" for place in range(len(compiled))))
        lines.append(f"trigger[lazy]: ANY {json.dumps(form.marker)}")
    lines.append("ANY: /(.|\\n)*/")
    lines.append("call: " + " | ".join(f"call_{place}" for place in range(len(compiled))))
    for place, (name, one) in enumerate(compiled.items()):
        custom = isinstance(one, Custom)
        opening = form.custom_opening(name) if custom else form.opening(name)
        tail = "" if custom else _literal(form.tail)
        lines.append(f"call_{place}: {json.dumps(opening)} arguments_{place} {tail}")
        if choice == "auto" and content is None and not form.marker.startswith("{"):
            after = json.dumps(opening.removeprefix(form.marker))
            lines.append(f"opened_{place}: trigger {after} arguments_{place} {tail}")
        if isinstance(one, Custom):
            lines += _custom_lines(place, one, form)
            continue
        schema = one.lowered if isinstance(one.lowered, dict) else {"type": "object"}
        lines.append(f"arguments_{place}: %json {json.dumps({**schema, 'x-guidance': SPACED})}")
    return "%llguidance {}\n" + "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""


def _custom_lines(place: int, one: Custom, form: CallForm) -> list[str]:
    """The text up to the call's tail, which ends it where it first may."""
    if one.lark is not None:
        return [f"arguments_{place}: @custom_{place} {json.dumps(form.custom_tail)}"]
    if one.regex is None:
        return [f"arguments_{place}[lazy]: ANY {json.dumps(form.custom_tail)}"]
    tail = form.custom_tail.replace("\n", "\\n").replace("/", "\\/")
    body = one.regex.removeprefix("^").removesuffix("$").replace("/", "\\/")
    return [f"arguments_{place}[lazy]: /(?:{body}){tail}/"]


class CallChecks:
    """The schemas' own word on each call's arguments, when the call closes. takes: by name; None: any text."""

    def __init__(
        self, takes: Mapping[str, Validators | Grammar | None], form: CallForm, content: Validators | None
    ) -> None:
        self.takes = takes
        self.form = form
        self.content = content

    def begin(self) -> int:
        return 0

    def read(self, place: int, text: bytes) -> int | None:
        """place: calls that were judged."""
        recent = text[-len(self.form.tail) - 64 :]
        ends = [tail.encode() for tail in (self.form.tail or "}", self.form.custom_tail) if tail]
        if not any(end in recent for end in ends):
            return place
        calls = self._calls(text)
        return None if any(not self._right(call) for call in calls[place:]) else len(calls)

    def suggest(self, place: int, text: bytes) -> Iterable[bytes]:
        return ()

    def may_end(self, place: int, text: bytes) -> bool:
        calls = self._calls(text)
        if calls or self.content is None:
            return all(self._right(call) for call in calls)
        try:
            return self.content.accepts(load(text))
        except (ValueError, RecursionError):
            return False

    def _calls(self, text: bytes) -> list[Call]:
        reader = CallReader(self.form)
        reader.push(text.decode("utf-8", "ignore"))
        return reader.calls

    def _right(self, call: Call) -> bool:
        if call.name not in self.takes:
            return False
        judge = self.takes[call.name]
        if call.custom or not isinstance(judge, Validators):
            wants_text = judge is None or isinstance(judge, Grammar)
            return call.custom and wants_text and (judge is None or bool(judge.accepts(call.arguments)))
        try:
            return judge.accepts(load(call.arguments))
        except (ValueError, RecursionError):
            return False
