"""A prompt that the guard refuses, where a structured answer was asked for: `refusal`, as a message or a stream.

No schema may press an answer out of a refused prompt, and a client that parses the answer reads the refusal.
Elsewhere a refused prompt stays an error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi.responses import JSONResponse, Response

from gnomon.errors import Blocked
from gnomon.generation import Usage
from gnomon.serve import sse
from gnomon.serve.generating import usage_of

NOTHING = Usage(prompt_tokens=0, completion_tokens=0)


def refusal(
    head: Mapping[str, Any], blocked: Blocked, choices: int, headers: Mapping[str, str], *, stream: bool, usage: bool
) -> Response:
    """The whole answer: `choices` times the same refusal, no token computed."""
    counted = usage_of([NOTHING] * choices, choices)
    if stream:
        return sse.stream(_events(head, blocked.message, choices, counted if usage else None), dict(headers))
    message = {"role": "assistant", "content": None, "refusal": blocked.message}
    answer = {
        **head,
        "object": "chat.completion",
        "choices": [
            {"index": index, "message": message, "logprobs": None, "finish_reason": "stop"} for index in range(choices)
        ],
        "usage": counted,
    }
    return JSONResponse(answer, headers=dict(headers))


async def _events(
    head: Mapping[str, Any], text: str, choices: int, usage: Mapping[str, Any] | None
) -> AsyncGenerator[Mapping[str, Any], None]:
    base = {**head, "object": "chat.completion.chunk"}
    empty = {"usage": None} if usage is not None else {}
    deltas: list[tuple[dict[str, Any], str | None]] = [
        ({"role": "assistant", "content": None, "refusal": ""}, None),
        ({"refusal": text}, None),
        ({}, "stop"),
    ]
    for index in range(choices):
        for delta, reason in deltas:
            choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
            yield {**base, "choices": [choice], **empty}
    if usage is not None:
        yield {**base, "choices": [], "usage": usage}
