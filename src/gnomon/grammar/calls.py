"""How families of models write calls of tools, and how such a text is taken apart again as it comes.

"hermes" (`<tool_call>` around a JSON object; Qwen, Hermes, and every model that has no way of its own), "llama3" (one
JSON object with "parameters"), "gemma", "mistral" and "mistral-named". Knows no schemas and no HTTP.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class CallForm:
    """How a model writes a call. head: up to the arguments, {name} in its place; marker: what no free text may hold.

    several: whether more than one may be made; between: what stands between two. quoted: whether the name is a JSON
    string. controls: control tokens among all this, which are text where calls are made.
    """

    name: str
    head: str
    tail: str
    marker: str
    several: bool
    between: str = "\n"
    quoted: bool = True
    controls: tuple[str, ...] = ()
    custom_head: str = ""
    custom_tail: str = ""
    """Around the text of a custom tool; "": this form has none."""

    def custom_opening(self, tool: str) -> str:
        return self.custom_head.replace("{name}", json.dumps(tool, ensure_ascii=False))

    def opening(self, function: str) -> str:
        return self.head.replace("{name}", json.dumps(function, ensure_ascii=False) if self.quoted else function)


HERMES = CallForm(
    "hermes",
    '<tool_call>\n{"name": {name}, "arguments": ',
    "}\n</tool_call>",
    marker="<tool_call>",
    several=True,
    custom_head='<tool_call>\n{"name": {name}}\n',
    custom_tail="\n</tool_call>",
)
LLAMA3 = CallForm("llama3", '{"name": {name}, "parameters": ', "}", marker='{"name"', several=False)
GEMMA = CallForm("gemma", LLAMA3.head, LLAMA3.tail, LLAMA3.marker, several=False)
"""As Google's documentation of Gemma has it: the same object, asked for in the prompt; the template has no tools."""
MISTRAL = CallForm(
    "mistral",
    '[TOOL_CALLS] [{"name": {name}, "arguments": ',
    "}]",
    marker="[TOOL_CALLS]",
    several=False,
    controls=("[TOOL_CALLS]",),
)
"""Mistral's earlier templates: a list, of which one call is taken."""
MISTRAL_NAMED = CallForm(
    "mistral-named",
    "[TOOL_CALLS]{name}[ARGS]",
    "",
    marker="[TOOL_CALLS]",
    several=True,
    between="",
    quoted=False,
    controls=("[TOOL_CALLS]", "[ARGS]"),
)
"""Mistral's later templates: the name as it is, then the arguments."""
FORMS = {form.name: form for form in (HERMES, LLAMA3, GEMMA, MISTRAL, MISTRAL_NAMED)}


@dataclass(frozen=True)
class Call:
    """One call, arguments (a custom tool's text) as the model wrote them."""

    name: str
    arguments: str
    custom: bool = False


def form_of(template: str) -> CallForm:
    """The form that a chat template teaches its model; "hermes" when it teaches none."""
    if "[TOOL_CALLS]" in template:
        return MISTRAL_NAMED if "[ARGS]" in template and "[CALL_ID]" not in template else MISTRAL
    if "<start_of_turn>" in template and "tools" not in template:
        return GEMMA
    if "<tool_call>" not in template and '"parameters"' in template and "tools" in template:
        return LLAMA3
    return HERMES


@dataclass(frozen=True)
class Piece:
    """What a stretch of text was. kind: "content", "call" (text is the name) or "arguments"; index: which call."""

    kind: Literal["content", "call", "arguments"]
    text: str
    index: int = 0
    custom: bool = False


class CallReader:
    """Takes a text of a tool grammar apart as it comes. `calls`: those that are complete."""

    def __init__(self, form: CallForm) -> None:
        self.form = form
        self.calls: list[Call] = []
        self.opened = 0
        self._held = ""
        self._name: str | None = None
        self._arguments = ""
        self._before, _, self._after = form.head.partition("{name}")
        self._custom = False

    def push(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        while (piece := self._next()) is not None:
            if piece.text:
                pieces.append(piece)
        return pieces

    def finish(self) -> list[Piece]:
        """The text is over: what was held because it might have begun a call is content."""
        held, self._held = self._held, ""
        if not held:
            return []
        return (
            [Piece("content", held)]
            if self._name is None
            else [Piece("arguments", held, self.opened - 1, self._custom)]
        )

    def _next(self) -> Piece | None:
        return self._in_content() if self._name is None else self._in_arguments()

    def _in_content(self) -> Piece | None:
        """Up to the next call's head; between two calls a line break is nothing."""
        if self.calls and self.form.between and self._held.startswith(self.form.between):
            self._held = self._held[len(self.form.between) :]
        start = self._held.find(self._before)
        if start > 0:
            return self._take_content(start)
        if start == 0:
            return self._opened()
        safe = len(self._held) - _overlap(self._held, self._before)
        return self._take_content(safe) if safe > 0 else None

    def _opened(self) -> Piece | None:
        """The name, once it is certain what follows it."""
        found = self._called()
        if found is None:
            return None
        name, end = found
        customs = self.form.custom_head.partition("{name}")[2]
        for after, custom in ((self._after, False), (customs, True)):
            if after and self._held.startswith(after, end):
                self._name, self._custom = name, custom
                self._held = self._held[end + len(after) :]
                self.opened += 1
                return Piece("call", self._name, self.opened - 1, custom)
        return None

    def _called(self) -> tuple[str, int] | None:
        """(the name, where it ends); None: it is not there yet."""
        if not self.form.quoted:
            end = self._held.find(self._after, len(self._before))
            return None if end < 0 else (self._held[len(self._before) : end], end)
        try:
            name, end = json.JSONDecoder().raw_decode(self._held, len(self._before))
        except ValueError:
            return None
        return str(name), end

    @property
    def _tail(self) -> str:
        return self.form.custom_tail if self._custom else self.form.tail

    def _take_content(self, count: int) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        return Piece("content", text)

    def _in_arguments(self) -> Piece | None:
        """Up to the call's tail. JSON as calls have it has no line break, so a tail with one is never part of it."""
        end = self._end_of_arguments()
        if end is None:
            safe = len(self._held) - _overlap(self._held, self._tail)
            if safe <= 0 or "\n" not in self._tail:
                return None
            return self._take_arguments(safe)
        piece = self._take_arguments(end)
        self._held = self._held[len(self._tail) :]
        self.calls.append(Call(self._name or "", self._arguments, self._custom))
        self._name, self._arguments = None, ""
        return piece

    def _end_of_arguments(self) -> int | None:
        if "\n" in self._tail:
            found = self._held.find(self._tail)
            return found if found >= 0 else None
        try:
            _, end = json.JSONDecoder().raw_decode(self._held)
        except ValueError:
            return None
        return end if self._held.startswith(self._tail, end) else None

    def _take_arguments(self, count: int) -> Piece:
        text, self._held = self._held[:count], self._held[count:]
        self._arguments += text
        return Piece("arguments", text, self.opened - 1, self._custom)


def _overlap(text: str, mark: str) -> int:
    """How much of the text's end may be the beginning of a mark."""
    return next((size for size in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:size])), 0)
