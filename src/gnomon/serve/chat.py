"""POST /v1/chat/completions, as the official client speaks it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gnomon.errors import Blocked, UsageError
from gnomon.generation import Chunk, Generation, TokenLogprob
from gnomon.model import Model
from gnomon.serve import sse
from gnomon.serve.body import read_json, schema
from gnomon.serve.generating import Generating, found_entry, logprob_entry, options_of, usage_of
from gnomon.serve.protocol import ChatBody, parse
from gnomon.serve.refusals import refusal
from gnomon.serve.state import state_of
from gnomon.serve.strict import Profile
from gnomon.serve.structured import grammar_usage, take_constraint
from gnomon.serve.toolcalls import CallDeltas, Calling, ToolUse, form_for, told, tool_use

router = APIRouter()


@router.post("/v1/chat/completions", openapi_extra=schema(ChatBody))
async def chat_completions(request: Request) -> Response:
    """Answer a conversation; with `stream: true` as server-sent events."""
    body = parse(ChatBody, await read_json(request))
    state = state_of(request)
    model = state.model(body.model)
    extra = body.extra_options()
    profile = state.options.strict_profile
    use = await asyncio.to_thread(tool_use, body.tools, body.tool_choice, body.parallel_tool_calls, profile)
    constraint = await asyncio.to_thread(_constraint, body, extra, use, model, profile)
    options, headers = options_of(extra, model)
    options |= _own_options(body) | constraint
    variables = {**(body.chat_template_kwargs or {}), "add_generation_prompt": body.add_generation_prompt}
    messages, variables = told(model, body.messages, use, variables)
    usage = body.stream_options is not None and body.stream_options.include_usage
    try:
        run = await Generating.start(
            state, model, [messages], options, chat=True, id_prefix="chatcmpl", variables=variables
        )
    except Blocked as blocked:
        if not constraint:
            raise
        head: dict[str, Any] = {"id": f"chatcmpl-{uuid4().hex}", "created": int(time.time()), "model": body.model}
        head |= {"system_fingerprint": model.fingerprint, "seed": options.get("seed")}
        return refusal(head, blocked, options.get("n") or 1, headers, stream=bool(body.stream), usage=usage)
    calling = Calling(use, form_for(model)) if use is not None else None
    head = {
        "id": run.id,
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": run.fingerprint,
        "seed": run.seed,
    }
    if body.stream:
        return sse.stream(_events(run, request, head, usage, calling), headers)
    generations = await run.collect(request)
    answer = {
        **head,
        "object": "chat.completion",
        "choices": [_choice(run.id, generation, calling) for generation in generations],
        "usage": usage_of([g.usage for g in generations], run.choices)
        | grammar_usage([g.outcome for g in generations]),
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


def _constraint(
    body: ChatBody, extra: dict[str, Any], use: ToolUse | None, model: Model, profile: Profile
) -> dict[str, Any]:
    """The grammar option that response_format, tools and other servers' spellings of them ask for."""
    wanted = take_constraint(extra, body.response_format, profile)
    calls = use.options(form_for(model), (wanted or {}).get("schema")) if use is not None else None
    if calls is not None and (extra.get("grammar") is not None or (wanted and "schema" not in wanted)):
        raise UsageError("Tools can be joined with a response_format, but with no other grammar.", param="tools")
    found = calls or wanted
    return {"grammar": found} if found else {}


async def _events(
    run: Generating, request: Request, head: Mapping[str, Any], include_usage: bool, calling: Calling | None
) -> AsyncGenerator[Mapping[str, Any], None]:
    """chat.completion.chunk events: a role first, then text, then the finish reason, then (asked for) the usage."""
    base = {**head, "object": "chat.completion.chunk"}
    empty = {"usage": None} if include_usage else {}
    reading = [CallDeltas(run.id, index, calling) for index in range(run.choices)] if calling else []
    for index in range(run.choices if calling is None else 0):
        yield {**base, "choices": [_delta(index, {"role": "assistant", "content": "", "refusal": None})], **empty}
    last: dict[int, Chunk] = {}
    async for chunk in run.chunks(request):
        found, ends = found_entry(chunk.findings, chunk.held), chunk.finish_reason is not None
        if calling is not None:
            deltas = reading[chunk.index].push(chunk.text, last=ends)
        else:
            deltas = [{"content": chunk.text}] if chunk.text else []
        if not deltas and (chunk.logprobs or (found and not ends)):
            deltas = [{"content": ""}]
        for place, delta in enumerate(deltas):
            entry = _delta(chunk.index, delta, chunk.logprobs if place == 0 else None)
            yield {**base, "choices": [entry | (found if place == 0 and not ends else {})], **empty}
        if chunk.finish_reason is not None:
            last[chunk.index] = chunk
            reason = reading[chunk.index].reason(chunk.finish_reason) if calling else chunk.finish_reason
            yield {**base, "choices": [_delta(chunk.index, {}, reason=reason) | found], **empty}
    if include_usage:
        chunks = [last[index] for index in sorted(last)]
        usage = usage_of([chunk.usage for chunk in chunks if chunk.usage], run.choices)
        yield {**base, "choices": [], "usage": usage | grammar_usage([chunk.outcome for chunk in chunks])}


def _delta(
    index: int, delta: Mapping[str, Any], logprobs: list[TokenLogprob] | None = None, reason: str | None = None
) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": reason}


def _choice(answer: str, generation: Generation, calling: Calling | None) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": generation.text, "refusal": None}
    reason: str = generation.finish_reason
    if calling is not None:
        message, reason = calling.message(answer, generation.index, generation.text, generation.finish_reason)
    return {
        "index": generation.index,
        "message": message,
        "logprobs": _logprobs(generation.logprobs),
        "finish_reason": reason,
    } | found_entry(generation.findings)


def _logprobs(tokens: list[TokenLogprob] | None) -> dict[str, Any] | None:
    if tokens is None:
        return None
    return {"content": [logprob_entry(token) for token in tokens], "refusal": None}
