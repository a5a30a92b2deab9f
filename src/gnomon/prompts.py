"""What a caller may give as a prompt, and how it becomes token ids.

A raw prompt is text or token ids; a conversation is a list of messages, rendered by the chat template elsewhere. Prompt
stages (the guard's input checks) see each text before it becomes tokens. Knows nothing of engines.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from gnomon.errors import PromptError
from gnomon.models.tokenizer import Tokenizer
from gnomon.patches.table import Laid
from gnomon.registry import ParsedOptions
from gnomon.stages import PromptStage, StageContext

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Admitted:
    """A prompt that the prompt stages let through, as token ids, with its parsed options and the patches they name."""

    ids: list[int]
    parsed: ParsedOptions
    options: Mapping[str, Any]
    context: StageContext
    patches: tuple[Laid, ...] = ()


def is_chat(prompt: Prompt | Messages) -> TypeGuard[Messages]:
    """Whether this is a conversation rather than a raw prompt."""
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def prompts_of(prompt: Prompt | Sequence[Prompt]) -> tuple[list[Prompt], bool]:
    """(the prompts, whether a list of them was given). A list of ints is one prompt of token ids."""
    if isinstance(prompt, str):
        return [prompt], False
    items = list(prompt)
    if not items:
        raise PromptError("The list of prompts is empty.", param="prompt")
    if all(isinstance(item, int) for item in items):
        return [items], False  # type: ignore[list-item]
    return items, True  # type: ignore[return-value]


def messages_of(messages: str | Messages) -> Messages:
    """A conversation; a string is one message of the user."""
    return [{"role": "user", "content": messages}] if isinstance(messages, str) else messages


def encoded(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """A raw prompt as token ids, with the model's BOS; ids pass unchanged. Raises PromptError."""
    if not isinstance(prompt, str):
        return list(prompt)
    if not prompt:
        raise PromptError("The prompt is empty.", hint="Give at least one character.", param="prompt")
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(f"The prompt is not valid Unicode at character {error.start}.", param="prompt") from None
    return tokenizer.encode(prompt)


def checked_ids(tokenizer: Tokenizer, prompt: Prompt, stages: Sequence[PromptStage]) -> list[int]:
    """A raw prompt as token ids, after every stage saw its text; encoded anew only where a stage changed it."""
    ids = encoded(tokenizer, prompt)
    if not stages:
        return ids
    text = given = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=False)
    for stage in stages:
        text = stage.check(text)
    return ids if text == given else encoded(tokenizer, text)


def checked_message(message: Mapping[str, Any], stages: Sequence[PromptStage]) -> dict[str, Any]:
    """A message with every text in it (content, parts, arguments of tool calls) as the stages let it through."""
    seeing = [stage for stage in stages if message.get("role") in getattr(stage, "roles", (message.get("role"),))]

    def checked(value: Any, key: str) -> Any:
        if isinstance(value, str):
            if key in ("role", "type", "id", "tool_call_id"):
                return value
            for stage in seeing:
                value = stage.check(value)
            return value
        if isinstance(value, Mapping):
            return {name: checked(inner, name) for name, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [checked(inner, key) for inner in value]
        return value

    return {name: checked(value, name) for name, value in message.items()}
