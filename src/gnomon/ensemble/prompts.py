"""The prompt of an ensemble as symbols, and what it means.

A raw prompt is its text. A conversation is CHAT, its messages and template variables as JSON, GO: every member renders
it with its own template. Plain symbols, so that the engine, the ledger and a replay need nothing else. What comes
after the prompt's length, or after GO, was generated.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gnomon.ensemble.symbols import Symbols, SymbolTokenizer
from gnomon.errors import PromptError


@dataclass(frozen=True)
class Prompt:
    """What the members are asked: `messages` (None for a raw prompt) or `text`."""

    text: bytes = b""
    messages: tuple[dict[str, Any], ...] | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)


def conversation(
    tokenizer: SymbolTokenizer, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> list[int]:
    """Messages as symbols."""
    try:
        body = json.dumps({"messages": [dict(m) for m in messages], **variables}, ensure_ascii=False)
    except TypeError as error:
        raise PromptError(f"The messages are not plain values: {error}.", param="messages") from None
    symbols = tokenizer.symbols
    return [symbols.chat, *tokenizer.encode(body), symbols.go]


def understand(symbols: Symbols, ids: Sequence[int], prompt_length: int | None) -> tuple[Prompt, int]:
    """(the prompt, how many symbols it takes) of a sequence that may already hold generated ones.

    prompt_length: of a raw prompt; None: the whole sequence is prompt. Raises PromptError for a misplaced sign.
    """
    if ids and ids[0] == symbols.chat:
        try:
            end = ids.index(symbols.go)
            body = json.loads(symbols.text(ids[1:end]).decode("utf-8"))
            messages = tuple(body.pop("messages"))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise PromptError(
                "The prompt begins with <|chat|>, but no conversation follows.", hint="Use chat().", param="prompt"
            ) from None
        return Prompt(messages=messages, variables=body), end + 1
    length = len(ids) if prompt_length is None else prompt_length
    if any(i >= symbols.stop for i in ids[:length]):
        raise PromptError("The prompt holds a sign of the ensemble where text should be.", param="prompt")
    return Prompt(text=symbols.text(ids[:length])), length
