"""POST /v1/chat/completions, as the official client speaks it."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gnomon.errors import UsageError
from gnomon.generation import Generation, TokenLogprob
from gnomon.serve import sse
from gnomon.serve.body import read_json, schema
from gnomon.serve.generating import Generating, found_entry, logprob_entry, options_of, usage_of
from gnomon.serve.protocol import ChatBody, parse
from gnomon.serve.state import state_of

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    body = parse(ChatBody, await read_json(request))
    state = state_of(request)
    model = state.model(body.model)
    options, headers = options_of(body.extra_options(), model)
    options |= _own_options(body)
    variables = {**(body.chat_template_kwargs or {}), "add_generation_prompt": body.add_generation_prompt}
    run = await Generating.start(
        state, model, [body.messages], options, chat=True, id_prefix="chatcmpl", variables=variables
    )
    head = {
        "id": run.id,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": run.fingerprint,
        "seed": run.seed,
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return sse.stream(_events(run, request, head, usage), headers)
    generations = await run.collect(request)
    answer = {
        **head,
        "object": "chat.completion",
        "choices": [_choice(generation) for generation in generations],
        "usage": usage_of([g.usage for g in generations], run.choices),
    }
    return JSONResponse(answer, headers=headers)


def _own_options(body: ChatBody) -> dict[str, Any]:
    """The fields this endpoint spells differently from the registry."""
    if body.top_logprobs is not None and not body.logprobs:
        raise UsageError("`top_logprobs` needs `logprobs: true`.", param="top_logprobs")
    options: dict[str, Any] = {}
    limit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    if limit is not None:
        options["max_tokens"] = limit
    if body.logprobs:
        options["logprobs"] = body.top_logprobs or 0
    return options


async def _events(
    run: Generating, request: Request, head: Mapping[str, Any], include_usage: bool
) -> AsyncGenerator[Mapping[str, Any], None]:
    """chat.completion.chunk events: a role first, then text, then the finish reason, then (asked for) the usage."""
    base = {**head, "object": "chat.completion.chunk"}
    empty = {"usage": None} if include_usage else {}
    for index in range(run.choices):
        yield {**base, "choices": [_delta(index, {"role": "assistant", "content": ""})], **empty}
    usages: dict[int, Any] = {}
    async for chunk in run.chunks(request):
        found = found_entry(chunk.findings)
        if chunk.text or chunk.logprobs or (found and chunk.finish_reason is None):
            delta = _delta(chunk.index, {"content": chunk.text}, chunk.logprobs)
            yield {**base, "choices": [delta | ({} if chunk.finish_reason else found)], **empty}
        if chunk.finish_reason is not None:
            usages[chunk.index] = chunk.usage
            yield {**base, "choices": [_delta(chunk.index, {}, reason=chunk.finish_reason) | found], **empty}
    if include_usage:
        yield {**base, "choices": [], "usage": usage_of([usages[i] for i in sorted(usages)], run.choices)}


def _delta(
    index: int, delta: Mapping[str, Any], logprobs: list[TokenLogprob] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": reason}


def _choice(generation: Generation) -> dict[str, Any]:
    return {
        "index": generation.index,
        "message": {"role": "assistant", "content": generation.text, "refusal": None},
        "logprobs": _logprobs(generation.logprobs),
        "finish_reason": generation.finish_reason,
    } | found_entry(generation.findings)


def _logprobs(tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {"content": [logprob_entry(token) for token in tokens], "refusal": None}
