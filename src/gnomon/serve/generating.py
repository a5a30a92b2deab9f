"""What chat and text completions share: admission, running n choices per prompt, waiting or streaming.

One code path for stream and non-stream. Shapes of the answers belong to the endpoints.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import Request

from gnomon.capability import Origin
from gnomon.errors import UsageError
from gnomon.generation import Chunk, Generation, TokenLogprob, Usage
from gnomon.model import Model
from gnomon.prompts import Admitted, Messages, Prompt
from gnomon.serve.protocol import split_options
from gnomon.serve.state import ServerState
from gnomon.serve.waiting import beside
from gnomon.submission import Submission, join


class Generating:
    """One HTTP request's submissions: a prompt each, n choices a prompt, indices running through all of them."""

    def __init__(self, state: ServerState, model: Model, submissions: list[Submission], choices: int) -> None:
        self.state = state
        self.model = model
        self.submissions = submissions
        self.choices = choices
        self.id = submissions[0].id
        self.seed = submissions[0].seed
        self.fingerprint = submissions[0].fingerprint

    @classmethod
    async def start(
        cls,
        state: ServerState,
        model: Model,
        prompts: Sequence[Prompt | Messages],
        options: Mapping[str, Any],
        *,
        chat: bool,
        id_prefix: str,
        variables: Mapping[str, Any] | None = None,
    ) -> Generating:
        """Admit and submit. Options are untrusted: parsed with the origin REQUEST."""
        choices = options.get("n") or 1
        if isinstance(choices, bool) or not isinstance(choices, int):
            raise UsageError("`n`: must be a whole number.", param="n")

        def admit() -> list[Admitted]:
            return [model.admit(one, options, origin=Origin.REQUEST, variables=variables) for one in prompts]

        admitted = await beside(admit)
        state.check_admission(model, choices * len(prompts), [len(one.ids) for one in admitted])

        def submit() -> list[Submission]:
            return [model.submit(one, options, chat=chat, id_prefix=id_prefix) for one in admitted]

        return cls(state, model, await asyncio.to_thread(submit), choices)

    async def collect(self, request: Request) -> list[Generation]:
        """All choices, finished. A client that goes away cancels them."""
        gathered: dict[int, list[Chunk]] = {}

        async def gather() -> None:
            async with aclosing(self.chunks(request)) as chunks:
                async for chunk in chunks:
                    gathered.setdefault(chunk.index, []).append(chunk)

        await _unless_gone(request, gather())
        return [join(gathered[index]) for index in sorted(gathered)]

    async def chunks(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """Chunks of all submissions as they come, with indices running through the prompts."""
        inbox: asyncio.Queue[Chunk | Exception | None] = asyncio.Queue()

        async def pump(place: int, source: AsyncIterator[Chunk]) -> None:
            try:
                async for chunk in source:
                    await inbox.put(replace(chunk, index=place * self.choices + chunk.index))
                await inbox.put(None)
            except Exception as error:
                await inbox.put(error)

        with self.state.running(self.submissions):
            tasks = [
                asyncio.create_task(pump(place, self.state.chunks(request, submission)))
                for place, submission in enumerate(self.submissions)
            ]
            try:
                left = len(tasks)
                while left:
                    item = await inbox.get()
                    if isinstance(item, Exception):
                        raise item
                    if item is None:
                        left -= 1
                    else:
                        yield item
            finally:
                for task in tasks:
                    task.cancel()


async def _unless_gone(request: Request, work: Any) -> None:
    """Run `work`; when the client disconnects first, cancel it."""
    task = asyncio.ensure_future(work)

    async def gone() -> None:
        while not await request.is_disconnected():
            await asyncio.sleep(0.1)

    watcher = asyncio.ensure_future(gone())
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait({task})
            raise asyncio.CancelledError
        task.result()
    finally:
        watcher.cancel()
        task.cancel()


def options_of(extra: Mapping[str, Any], model: Model) -> tuple[dict[str, Any], dict[str, str]]:
    """(options for the registry, response headers naming the fields that changed nothing)."""
    options, ignored = split_options(extra, model.registry.keys())
    return options, {"x-gnomon-ignored": ", ".join(sorted(ignored))} if ignored else {}


def usage_of(usages: Sequence[Usage], choices: int) -> dict[str, Any]:
    """OpenAI's usage: each prompt counted once, whatever n."""
    prompt = sum(usage.prompt_tokens for usage in usages[::choices])
    completion = sum(usage.completion_tokens for usage in usages)
    cached = sum(usage.cached_tokens for usage in usages[::choices])
    details = usages[0].details if len(usages) == 1 else {}
    return {
        **details,
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def found_entry(findings: Sequence[Mapping[str, Any]], held: int | None = None) -> dict[str, Any]:
    """What the guard says of a choice, as an extension key, which clients that do not know it pass over."""
    if not findings and held is None:
        return {}
    return {"guard": {"findings": [dict(finding) for finding in findings], **({} if held is None else {"held": held})}}


def logprob_entry(token: TokenLogprob, describe: Callable[[TokenLogprob], Any] | None = None) -> dict[str, Any]:
    """One token in OpenAI's chat logprobs shape, plus its id."""
    entry: dict[str, Any] = {
        "token": token.text,
        "token_id": token.token_id,
        "logprob": token.logprob,
        "bytes": list(token.bytes),
    }
    if token.trace:
        entry |= token.trace
    if describe is None:
        entry["top_logprobs"] = [logprob_entry(other, lambda _: None) for other in token.top]
    return entry
