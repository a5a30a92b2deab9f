"""Chat templates: messages in, the model's own prompt out, through jinja2's sandbox.

A template is untrusted code from a model file: it runs without access to anything but its variables, and its output
and loops are bounded. What users wrote can never become control tokens (see render_ids).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gnomon.errors import ChatTemplateError
from gnomon.models.tokenizer import Tokenizer

LONGEST_PROMPT = 50_000_000
ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Message = Mapping[str, Any]


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's own words for training; here it changes nothing."""

    tags = frozenset({"generation"})  # type: ignore[assignment]

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_render"), [], [], body).set_lineno(line)

    def _render(self, caller: Any) -> str:
        text: str = caller()
        return text


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, with multiplication and powers watched: `"x" * 10**9` is a bomb too."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and not (abs(left) <= 1000 and abs(right) <= 10):
            raise TemplateError(f"{left} ** {right} is too large")
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if hasattr(text, "__len__") and isinstance(times, int) and len(text) * times > LONGEST_PROMPT:
                    raise TemplateError("a repetition is too large")
        return super().call_binop(context, operator, left, right)


class ChatTemplate:
    """One model's template. Raises ChatTemplateError when it does not compile."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str) -> None:
        self.source = source
        self.tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._compiled  # noqa: B018 - a template that does not compile is an error now, not at the first request

    @cached_property
    def _compiled(self) -> Template:
        environment = _Environment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self.source)
        except TemplateError as error:
            raise ChatTemplateError(f"The chat template does not compile: {error}.") from None

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Any] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt's text. Raises ChatTemplateError with the template's own words, or naming the message at fault."""
        checked = [_message(message, place) for place, message in enumerate(messages)]
        if not checked:
            raise ChatTemplateError("There are no messages.", param="messages")
        pieces: list[str] = []
        length = 0
        try:
            for piece in self._compiled.generate(
                **{**variables, **self.tokens},
                messages=checked,
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            ):
                length += len(piece)
                if length > LONGEST_PROMPT:
                    raise ChatTemplateError(f"The chat template wrote more than {LONGEST_PROMPT} characters.")
                pieces.append(piece)
        except (
            TemplateError,
            TypeError,
            ValueError,
            OverflowError,
            ArithmeticError,
            LookupError,
            AttributeError,
        ) as error:
            raise ChatTemplateError(f"The chat template refused these messages: {error}", param="messages") from None
        return "".join(pieces)

    def render_ids(self, tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> list[int]:
        """The prompt as token ids.

        When a content holds the text of a control token ("<|im_end|>"), that text is encoded as plain text: nobody ends
        a turn by typing. All other prompts are encoded in one piece.
        """
        checked = [_message(message, place) for place, message in enumerate(messages)]
        control = [tokenizer.token_text(i) for i in tokenizer.special_ids]
        dangerous = [t for m in checked for t in _texts(m) if any(c and c in t for c in control)]
        if not dangerous:
            return tokenizer.encode(self.render(checked, **variables), add_special_tokens=False)
        return self._stitched(tokenizer, checked, dangerous, variables)

    def _stitched(
        self, tokenizer: Tokenizer, messages: list[dict[str, Any]], dangerous: list[str], variables: Mapping[str, Any]
    ) -> list[int]:
        """Render with a mark in each dangerous content's place, then encode template and contents apart."""
        contents: dict[str, str] = {}
        marked = []
        for message in messages:
            text = message.get("content")
            if isinstance(text, str) and text in dangerous:
                mark = f"gnomon{secrets.token_hex(16)}"
                contents[mark] = text
                message = {**message, "content": mark}
            elif any(t in dangerous for t in _texts(message)):
                raise ChatTemplateError(
                    "A message field other than `content` holds the text of a control token.", param="messages"
                )
            marked.append(message)
        rest = self.render(marked, **variables)
        ids: list[int] = []
        for mark, text in contents.items():
            before, found, rest = rest.partition(mark)
            if not found:
                raise ChatTemplateError(
                    "A message holds the text of a control token, and the chat template changes that message.",
                    hint="Remove the token's text from the message.",
                    param="messages",
                )
            ids += tokenizer.encode(before, add_special_tokens=False)
            ids += tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        return ids + tokenizer.encode(rest, add_special_tokens=False)


def _message(message: Message, place: int) -> dict[str, Any]:
    """One message, checked: a known role, content as text (parts of type text are joined)."""
    where = f"messages.{place}"
    if not isinstance(message, Mapping):
        raise ChatTemplateError(f"`{where}` must be an object.", param=where)
    role = message.get("role")
    if role not in ROLES:
        raise ChatTemplateError(f"`{where}.role` is {role!r}; known: {', '.join(ROLES)}.", param=f"{where}.role")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        content = "".join(_part(part, f"{where}.content.{i}") for i, part in enumerate(content))
    if content is None and role == "assistant":
        content = ""
    if not isinstance(content, str):
        raise ChatTemplateError(f"`{where}.content` must be text.", param=f"{where}.content")
    return {**message, "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise ChatTemplateError(f"`{where}` is of type {kind!r}; this model reads text only.", param=where)


def _texts(value: Any) -> list[str]:
    """Every string inside a message."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, Mapping):
        return [text for item in value.values() for text in _texts(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in _texts(item)]
    return []


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON without HTML escapes, as templates expect."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def _refuse(message: str) -> None:
    raise TemplateError(message)
