"""Tools in OpenAI's shapes: which may be called, how the prompt tells of them, and calls as answers and deltas."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gnomon.errors import GrammarError, UsageError
from gnomon.grammar.calls import HERMES, CallForm, CallReader, Piece, form_of
from gnomon.grammar.options import GrammarOptions
from gnomon.grammar.tools import NO_PARAMETERS
from gnomon.model import Model
from gnomon.serve.strict import Profile, strict_fault
from gnomon.serve.structured import SchemaRefused

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")


@dataclass(frozen=True)
class ToolUse:
    """What a request says of tools. choice "none": they are told of, and not called. named: one call was forced."""

    tools: tuple[Mapping[str, Any], ...]
    choice: Literal["none", "auto", "required"]
    parallel: bool
    named: bool

    def options(self, form: CallForm, content: Any) -> dict[str, Any] | None:
        """The grammar option that allows these calls."""
        if self.choice == "none" or not self.tools:
            return None
        calls = {
            "functions": [dict(tool) for tool in self.tools],
            "form": form.name,
            "choice": self.choice,
            "parallel": self.parallel and not self.named,
        }
        return {"tools": calls if content is None else {**calls, "content": content}}


def tool_use(tools: Any, tool_choice: Any, parallel: bool | None, profile: Profile) -> ToolUse | None:
    """Checked; None without tools. Raises UsageError and, for schemas, OpenAI's own words."""
    if tools is None or tools == []:
        if tool_choice not in (None, "none", "auto"):
            raise UsageError("`tool_choice` is only allowed when `tools` are given.", param="tool_choice")
        return None
    if not isinstance(tools, list):
        raise UsageError("`tools` must be a list.", param="tools")
    functions = [_function(tool, place, profile) for place, tool in enumerate(tools)]
    names = [function["name"] for function in functions]
    if len(set(names)) != len(names):
        raise UsageError("Two tools have the same name.", param="tools")
    choice, allowed, named = _choice(tool_choice, names)
    chosen = tuple(function for function in functions if allowed is None or function["name"] in allowed)
    return ToolUse(chosen, choice, parallel is not False, named)


def _custom(tool: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A tool that takes text: any, or of a grammar (`lark` or `regex`)."""
    custom = tool["custom"]
    name = custom.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"`{where}.custom.name` is needed: up to 64 letters, digits, _ and -.", param=where)
    wanted = custom.get("format") or {"type": "text"}
    if isinstance(wanted, Mapping) and wanted.get("type") == "grammar" and isinstance(wanted.get("grammar"), Mapping):
        try:
            found = {wanted["grammar"].get("syntax"): wanted["grammar"].get("definition")}
            fault = GrammarOptions.model_validate(found).grammar().unsatisfiable and "no text satisfies it."
        except GrammarError as error:
            fault = error.message
        except ValueError:
            fault = "its `syntax` is `lark` or `regex`, with a `definition`."
        if fault:
            message = f"Invalid grammar for tool '{name}': {fault}"
            raise SchemaRefused(message, param=f"{where}.custom.format", code="invalid_grammar")
    return {"name": name, "description": custom.get("description") or "", "custom": wanted}


def _function(tool: Any, place: int, profile: Profile) -> dict[str, Any]:
    where = f"tools[{place}]"
    if isinstance(tool, Mapping) and tool.get("type") == "custom" and isinstance(tool.get("custom"), Mapping):
        return _custom(tool, where)
    if not isinstance(tool, Mapping) or tool.get("type") != "function" or not isinstance(tool.get("function"), Mapping):
        kind = tool.get("type") if isinstance(tool, Mapping) else type(tool).__name__
        raise UsageError(
            f"`{where}` is of type {kind!r}; this server knows tools of type 'function' and 'custom'.", param=where
        )
    function = tool["function"]
    name = function.get("name")
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(f"`{where}.function.name` is needed: up to 64 letters, digits, _ and -.", param=where)
    schema = function.get("parameters") or NO_PARAMETERS
    fault = strict_fault(schema, profile) if function.get("strict") else None
    if fault is None:
        try:
            compiled = GrammarOptions.model_validate({"schema": schema}).grammar()
            fault = "no arguments satisfy it." if compiled.unsatisfiable else None
        except GrammarError as error:
            fault = error.message
    if fault is not None:
        raise SchemaRefused(
            f"Invalid schema for function '{name}': {fault}",
            param=f"{where}.function.parameters",
            code="invalid_function_parameters",
        )
    return {"name": name, "description": function.get("description") or "", "parameters": schema}


def _choice(given: Any, names: Sequence[str]) -> tuple[Literal["none", "auto", "required"], set[str] | None, bool]:
    """(how, which names, whether one was named)."""
    if given is None or given == "auto":
        return "auto", None, False
    if given in ("none", "required"):
        return given, None, False
    kind = given.get("type") if isinstance(given, Mapping) else None
    if kind in ("function", "custom"):
        return "required", {_known(given.get(kind), names)}, True
    if kind == "allowed_tools" and isinstance(allowed := given.get("allowed_tools"), Mapping):
        tools = [tool for tool in allowed.get("tools", []) if isinstance(tool, Mapping)]
        chosen = {_known(tool.get("function") or tool.get("custom"), names) for tool in tools}
        return ("required" if allowed.get("mode") == "required" else "auto"), chosen, False
    raise UsageError(
        f"`tool_choice` is {given!r}; known: none, auto, required, one function, allowed_tools.", param="tool_choice"
    )


def _known(function: Any, names: Sequence[str]) -> str:
    name = function.get("name") if isinstance(function, Mapping) else None
    if name not in names:
        raise UsageError(f"Tool choice '{name}' not found in 'tools' parameter.", param="tool_choice")
    return str(name)


# -- the prompt ---------------------------------------------------------------------------------------------------


def form_for(model: Model) -> CallForm:
    return form_of(model.template.source)


def told(
    model: Model, messages: list[dict[str, Any]], use: ToolUse | None, variables: dict[str, Any]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """(messages, template variables) that tell of the tools: in the template's own words where it has some, else in a
    system message, with earlier calls and their results as text."""
    if use is None and not any(m.get("tool_calls") or m.get("role") in ("tool", "function") for m in messages):
        return messages, variables
    if "tools" in model.template.source:
        tools = [{"type": "function", "function": _told(tool)} for tool in use.tools] if use else None
        rendered = [_with_objects(message) for message in messages]
        if form_for(model).controls:
            rendered = [_with_short_ids(message) for message in rendered]
        return rendered, {**variables, **({"tools": tools} if tools else {})}
    form = form_for(model)
    plain = _joined([_as_plain(message, form) for message in messages])
    if use is not None and use.choice != "none":
        words = _instructions(use.tools, form)
        if plain and plain[0].get("role") in ("system", "developer") and isinstance(plain[0].get("content"), str):
            plain[0] = {**plain[0], "content": f"{plain[0]['content']}\n\n{words}"}
        else:
            plain.insert(0, {"role": "system", "content": words})
    return plain, variables


def _instructions(tools: Sequence[Mapping[str, Any]], form: CallForm) -> str:
    listed = "\n".join(json.dumps(dict(tool), ensure_ascii=False) for tool in tools)
    example = form.opening("NAME") + '{"KEY": VALUE}' + form.tail
    words = f"You can call these functions:\n{listed}\nTo call one, write exactly this and nothing after it:\n{example}"
    if any("custom" in tool for tool in tools):
        words += f"\nOne with `custom` takes text:\n{form.custom_opening('NAME')}TEXT{form.custom_tail}"
    return words


def _told(tool: Mapping[str, Any]) -> dict[str, Any]:
    """A custom tool for a template that knows functions alone."""
    if "custom" not in tool:
        return dict(tool)
    form = HERMES  # custom tools are known in this form alone
    how = f"{tool['description']} Takes text, not JSON: {form.custom_opening(tool['name'])}TEXT{form.custom_tail}"
    return {"name": tool["name"], "description": how.strip(), "parameters": NO_PARAMETERS}


def _with_objects(message: Mapping[str, Any]) -> dict[str, Any]:
    """Templates write a call's arguments themselves: they want the value, not its text."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    return {**message, "tool_calls": [_as_function(call) for call in calls]}


def _as_function(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call for a template that knows functions alone."""
    if isinstance(custom := call.get("custom"), Mapping):
        return {**call, "function": {"name": custom.get("name"), "arguments": {"input": custom.get("input")}}}
    return {**call, "function": _parsed(call.get("function") or {})}


def _parsed(function: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return {**function, "arguments": json.loads(function.get("arguments") or "{}")}
    except (TypeError, ValueError):
        return dict(function)


def _with_short_ids(message: Mapping[str, Any]) -> dict[str, Any]:
    """Mistral's templates take ids of nine letters or digits alone."""
    made = dict(message)
    if isinstance(made.get("tool_call_id"), str):
        made["tool_call_id"] = _short(made["tool_call_id"])
    if isinstance(calls := made.get("tool_calls"), list):
        made["tool_calls"] = [{**call, "id": _short(str(call.get("id")))} for call in calls]
    return made


def _short(identity: str) -> str:
    fits = len(identity) == 9 and identity.isalnum()
    return identity if fits else hashlib.sha256(identity.encode()).hexdigest()[:9]


def _joined(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results that follow one another as one message: many templates want roles in turn."""
    made: list[dict[str, Any]] = []
    for message in messages:
        told = message.pop("result", False)
        if told and made and made[-1]["result"]:
            made[-1]["content"] += "\n" + message["content"]
        else:
            made.append({**message, "result": told})
    return [{key: value for key, value in message.items() if key != "result"} for message in made]


def _as_plain(message: Mapping[str, Any], form: CallForm) -> dict[str, Any]:
    """Calls and their results as text, for a template that knows neither. A key "result" marks the latter."""
    if message.get("role") in ("tool", "function"):
        content = f"<tool_response>\n{message.get('content')}\n</tool_response>"
        return {"role": "user", "content": content, "result": True}
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        return dict(message)
    written = [_written(call, form) for call in calls if isinstance(call, Mapping)]
    content = message.get("content") or ""
    return {"role": message.get("role"), "content": "\n".join([*([str(content)] if content else []), *written])}


def _written(call: Mapping[str, Any], form: CallForm) -> str:
    if isinstance(custom := call.get("custom"), Mapping):
        return form.custom_opening(str(custom.get("name"))) + str(custom.get("input")) + form.custom_tail
    function = call.get("function") or {}
    return form.opening(str(function.get("name"))) + str(function.get("arguments")) + form.tail


# -- the answer ---------------------------------------------------------------------------------------------------


def call_id(answer: str, choice: int, index: int) -> str:
    """The same for the same answer: ids are no source of chance."""
    return "call_" + hashlib.sha256(f"{answer}/{choice}/{index}".encode()).hexdigest()[:24]


@dataclass(frozen=True)
class Calling:
    """How the answers of one request are read: what may be called, and how this model writes it."""

    use: ToolUse
    form: CallForm

    def message(self, answer: str, choice: int, text: str, reason: str) -> tuple[dict[str, Any], str]:
        """(the message of a whole answer, its finish reason)."""
        reader = CallReader(self.form)
        pieces = [*reader.push(text), *reader.finish()] if self.use.choice != "none" else [Piece("content", text)]
        content = "".join(piece.text for piece in pieces if piece.kind == "content")
        message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
        if reader.opened:
            message["content"] = content or None
            message["tool_calls"] = [_opened_call(answer, choice, index, pieces) for index in range(reader.opened)]
        return message, self.reason(reason, reader)

    def reason(self, reason: str, reader: CallReader) -> str:
        """OpenAI's: a forced, named call ends with "stop"; other calls with "tool_calls"."""
        if reason != "stop" or not reader.opened:
            return reason
        return "stop" if self.use.named else "tool_calls"


class CallDeltas:
    """One choice's text as deltas: content, a call's name, its arguments piece by piece."""

    def __init__(self, answer: str, choice: int, calling: Calling) -> None:
        self.answer = answer
        self.choice = choice
        self.calling = calling
        self.reader = CallReader(calling.form)
        self._first = True

    def push(self, text: str, *, last: bool) -> list[dict[str, Any]]:
        if self.calling.use.choice == "none":
            pieces = [Piece("content", text)] if text else []
        else:
            pieces = [*self.reader.push(text), *(self.reader.finish() if last else [])]
        deltas = [self._delta(piece) for piece in pieces]
        if last and self._first:
            deltas.append(self._delta(Piece("content", "")))
        return deltas

    def reason(self, reason: str) -> str:
        return self.calling.reason(reason, self.reader)

    def _delta(self, piece: Piece) -> dict[str, Any]:
        """The first of a choice brings the role."""
        first, self._first = self._first, False
        if piece.kind == "content":
            return {"role": "assistant", "content": piece.text, "refusal": None} if first else {"content": piece.text}
        if piece.kind == "arguments":
            part = {"custom": {"input": piece.text}} if piece.custom else {"function": {"arguments": piece.text}}
            return {"tool_calls": [{"index": piece.index, **part}]}
        identity = {"index": piece.index, "id": call_id(self.answer, self.choice, piece.index)}
        call = {**identity, **_call(piece.text, "", custom=piece.custom)}
        if first:
            return {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None}
        return {"tool_calls": [call]}


def _opened_call(answer: str, choice: int, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """A call, complete or (where the text was cut) as far as it came."""
    mine = [piece for piece in pieces if piece.index == index and piece.kind != "content"]
    named = next(piece for piece in mine if piece.kind == "call")
    arguments = "".join(piece.text for piece in mine if piece.kind == "arguments")
    return {"id": call_id(answer, choice, index), **_call(named.text, arguments, custom=named.custom)}


def _call(name: str, arguments: str, *, custom: bool) -> dict[str, Any]:
    if custom:
        return {"type": "custom", "custom": {"name": name, "input": arguments}}
    return {"type": "function", "function": {"name": name, "arguments": arguments}}
