"""POST /v1/completions: raw prompts, text or token ids, one or many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from gnomon.errors import PromptError
from gnomon.generation import Generation, TokenLogprob
from gnomon.serve import sse
from gnomon.serve.body import read_json, schema
from gnomon.serve.generating import Generating, found_entry, options_of, usage_of
from gnomon.serve.protocol import CompletionBody, parse
from gnomon.serve.state import state_of
from gnomon.serve.structured import grammar_usage, take_constraint

router = APIRouter()
DEFAULT_TOKENS = 16
"""OpenAI's own default for this endpoint."""


@router.post("/v1/completions", openapi_extra=schema(CompletionBody))
async def completions(request: Request) -> Response:
    """Continue one or several prompts; with `stream: true` as server-sent events."""
    body = parse(CompletionBody, await read_json(request))
    state = state_of(request)
    model = state.model(body.model)
    extra = body.extra_options()
    constraint = await asyncio.to_thread(take_constraint, extra, body.response_format, state.options.strict_profile)
    options, headers = options_of(extra, model)
    options |= {"grammar": constraint} if constraint else {}
    usual = model.defaults.get("max_tokens") or DEFAULT_TOKENS
    options["max_tokens"] = body.max_tokens if body.max_tokens is not None else usual
    prompts = _prompts(body.prompt)
    run = await Generating.start(state, model, prompts, options, chat=False, id_prefix="cmpl")
    head = {
        "id": run.id,
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "system_fingerprint": run.fingerprint,
        "seed": run.seed,
    }
    if body.stream:
        usage = body.stream_options is not None and body.stream_options.include_usage
        return sse.stream(_events(run, request, head, usage), headers)
    generations = await run.collect(request)
    usages = usage_of([g.usage for g in generations], run.choices)
    usages |= grammar_usage([g.outcome for g in generations])
    return JSONResponse({**head, "choices": [_choice(g) for g in generations], "usage": usages}, headers=headers)


def _prompts(prompt: str | list[str] | list[int] | list[list[int]]) -> list[Any]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise PromptError("`prompt` is empty.", param="prompt")
    return [prompt] if isinstance(prompt[0], int) else list(prompt)


async def _events(
    run: Generating, request: Request, head: Mapping[str, Any], include_usage: bool
) -> AsyncGenerator[Mapping[str, Any], None]:
    empty = {"usage": None} if include_usage else {}
    usages: dict[int, Any] = {}
    offsets: dict[int, int] = {}
    async for chunk in run.chunks(request):
        offset = offsets.get(chunk.index, 0)
        offsets[chunk.index] = offset + len(chunk.text)
        block = _logprobs([*(chunk.prompt_logprobs or ()), *(chunk.logprobs or ())], offset) if chunk.logprobs else None
        choice = {"index": chunk.index, "text": chunk.text, "logprobs": block, "finish_reason": chunk.finish_reason}
        choice |= found_entry(chunk.findings, chunk.held)
        if chunk.finish_reason is not None:
            usages[chunk.index] = chunk.usage
        yield {**head, "choices": [choice], **empty}
    if include_usage:
        yield {**head, "choices": [], "usage": usage_of([usages[i] for i in sorted(usages)], run.choices)}


def _choice(generation: Generation) -> dict[str, Any]:
    tokens = generation.logprobs
    block = _logprobs([*(generation.prompt_logprobs or ()), *tokens], 0) if tokens is not None else None
    return {
        "index": generation.index,
        "text": generation.text,
        "logprobs": block,
        "finish_reason": generation.finish_reason,
    } | found_entry(generation.findings)


def _logprobs(tokens: Sequence[TokenLogprob], offset: int) -> dict[str, Any]:
    """OpenAI's older shape: parallel lists."""
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{other.text: other.logprob for other in token.top} for token in tokens],
        "text_offset": offsets,
    }
