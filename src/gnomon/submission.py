"""A Submission: one prompt's n running choices, to iterate over, to await, or to collect.

The engine's thread puts chunks in; a consumer on any thread or event loop takes them out. Dropping it cancels them.
"""

from __future__ import annotations

import asyncio
import json
import logging
import queue
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any

from gnomon.engine.request import Decision, Finished, Request, SamplingParams, TokenEvent, always
from gnomon.engine.worker import EngineWorker
from gnomon.errors import GnomonError
from gnomon.generation import Chunk, Generation, Run, TokenLogprob
from gnomon.kernels.side import SidePath
from gnomon.models.tokenizer import Tokenizer
from gnomon.session import SessionInfo, TextSession
from gnomon.stages import Stages, TokenGate

log = logging.getLogger("gnomon.submission")


class Submission:
    """One prompt's n running choices: iterate over chunks, or collect whole generations; dropping it cancels them.

    owner: the model, which must not be dropped, and so closed, while they run.
    """

    def __init__(
        self, owner: object, worker: EngineWorker, id: str, seed: int, prompt_tokens: int, fingerprint: str = ""
    ) -> None:
        self.owner = owner
        self.worker = worker
        self.id = id
        self.fingerprint = fingerprint
        self.seed = seed
        self.prompt_tokens = prompt_tokens
        self.requests: list[str] = []
        self._queue: queue.SimpleQueue[Chunk | GnomonError] = queue.SimpleQueue()
        self._listener: Callable[[Chunk | GnomonError], None] | None = None
        self._lock = threading.Lock()

    def put(self, item: Chunk | GnomonError) -> None:
        """Called on the engine's thread."""
        with self._lock:
            if self._listener is not None:
                self._listener(item)
            else:
                self._queue.put(item)

    def cancel(self) -> None:
        for request in self.requests:
            self.worker.cancel(request)

    def __iter__(self) -> Iterator[Chunk]:
        left = len(self.requests)
        try:
            while left:
                item = self._queue.get()
                if isinstance(item, GnomonError):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            if left:
                self.cancel()

    async def chunks(self) -> AsyncIterator[Chunk]:
        """The chunks, asynchronously; leaving early cancels the requests within a token."""
        loop = asyncio.get_running_loop()
        inbox: asyncio.Queue[Chunk | GnomonError] = asyncio.Queue()

        def listener(item: Chunk | GnomonError) -> None:
            loop.call_soon_threadsafe(inbox.put_nowait, item)

        with self._lock:
            while not self._queue.empty():
                inbox.put_nowait(self._queue.get())
            self._listener = listener
        left = len(self.requests)
        try:
            while left:
                item = await inbox.get()
                if isinstance(item, GnomonError):
                    raise item
                left -= item.finish_reason is not None
                yield item
        finally:
            if left:
                self.cancel()

    def collect(self) -> list[Generation]:
        """Wait for all choices, in index order."""
        gathered: dict[int, list[Chunk]] = {}
        for chunk in self:
            gathered.setdefault(chunk.index, []).append(chunk)
        return [join(gathered[index]) for index in sorted(gathered)]

    async def acollect_all(self) -> list[Generation]:
        """collect(), awaitable."""
        gathered: dict[int, list[Chunk]] = {}
        async for chunk in self.chunks():
            gathered.setdefault(chunk.index, []).append(chunk)
        return [join(gathered[index]) for index in sorted(gathered)]

    async def acollect(self) -> Generation | list[Generation]:
        results = await self.acollect_all()
        return results if len(results) > 1 else results[0]


def join(chunks: Sequence[Chunk]) -> Generation:
    """One choice's chunks as a finished Generation."""
    last = chunks[-1]
    if last.finish_reason is None or last.usage is None:
        raise GnomonError("The stream of a choice ended without a finish reason.")
    with_logprobs = any(chunk.logprobs is not None for chunk in chunks)
    prompt: list[TokenLogprob] | None = next((c.prompt_logprobs for c in chunks if c.prompt_logprobs), None)
    return Generation(
        id=last.id,
        text="".join(chunk.text for chunk in chunks),
        token_ids=[token for chunk in chunks for token in chunk.token_ids],
        logprobs=[t for chunk in chunks for t in chunk.logprobs or ()] if with_logprobs else None,
        finish_reason=last.finish_reason,
        seed=last.seed,
        fingerprint=last.fingerprint,
        usage=last.usage,
        index=last.index,
        prompt_logprobs=prompt,
        findings=tuple(finding for chunk in chunks for finding in chunk.findings),
        outcome=last.outcome,
    )


class Recorder:
    """Watches one choice and reports it as a Run when it ended on its own; cancelled and failed ones are no runs."""

    def __init__(self, run: Run, report: Callable[[Run], None]) -> None:
        self.run = run
        self.report = report
        self._drawn: list[tuple[int, int]] = []
        self._texts: list[str] = []

    def on_token(self, event: TokenEvent, decision: Decision) -> None:
        self._drawn.append((event.token_id, event.checksum))
        if decision.kind == "rollback":
            del self._drawn[-decision.count :]

    def on_chunk(self, chunk: Chunk) -> None:
        self._texts.append(chunk.text)

    def on_finish(self, finished: Finished, *, private: bool = False) -> None:
        """private: tokens that may be shown nowhere were drawn; only their hash is noted."""
        if finished.reason in ("cancelled", "error"):
            return
        digest = sha256(b"".join(struct.pack("<qI", *pair) for pair in self._drawn)).hexdigest()
        tokens, text = [] if private else [token for token, _ in self._drawn], "".join(self._texts)
        self.report(
            replace(self.run, token_ids=tokens, text=text, finish_reason=finished.reason, digest=digest),
        )


def noted_run(
    submission: Submission,
    ids: list[int],
    options: Mapping[str, Any],
    *,
    model: str,
    reference: str,
    profile: str,
    max_tokens: int,
) -> Run:
    """What is known of a run before it begins. Options that JSON cannot hold are noted as text: no replay of those."""
    plain = {key: value for key, value in options.items() if key != "seed" and value is not None}
    plain["max_tokens"] = max_tokens
    try:
        plain, replayable = json.loads(json.dumps(plain)), True
    except (TypeError, ValueError):
        plain, replayable = {key: repr(value) for key, value in plain.items()}, False
    return Run(
        id=submission.id,
        choice=0,
        created=time.time(),
        model=model,
        reference=reference,
        fingerprint=submission.fingerprint,
        profile=profile,
        prompt_ids=ids,
        options=plain,
        replayable=replayable,
        seed=submission.seed,
    )


def make_request(
    submission: Submission,
    index: int,
    ids: list[int],
    params: SamplingParams,
    stages: Stages,
    tokenizer: Tokenizer,
    *,
    want_logprobs: bool,
    echo: str = "",
    healed: str = "",
    recorder: Recorder | None = None,
    sides: Mapping[str, SidePath] | None = None,
) -> Request:
    """One choice: its text session between the engine and the submission.

    echo: text to show before the first token. healed: the prompt's end, which is generated again.
    sides: what runs beside the weights, in order, by identity.
    """

    def emit(chunk: Chunk) -> None:
        if recorder is not None:
            recorder.on_chunk(chunk)
        submission.put(chunk)

    session = TextSession(
        tokenizer,
        stages.stream,
        SessionInfo(submission.id, index, submission.seed, submission.fingerprint),
        emit,
        want_logprobs=want_logprobs,
        echo=echo,
        healed=healed,
        gate=next((stage for stage in stages.mask if isinstance(stage, TokenGate)), None),
    )

    def on_token(event: TokenEvent) -> Decision:
        decision = session.on_token(event)
        if recorder is not None:
            recorder.on_token(event, decision)
        return decision

    def end(finished: Finished) -> None:
        try:
            final = session.on_finish(finished)
            if recorder is not None:
                recorder.on_chunk(final)
                recorder.on_finish(finished, private=session.private)
            submission.put(finished.error if finished.error is not None else final)
        except Exception as error:
            log.exception("The end of request %s failed", submission.id)
            submission.put(GnomonError(f"The end of the request failed: {type(error).__name__}."))

    def on_finish(finished: Finished) -> None:
        if session.waiting and session.reason is None:
            threading.Thread(target=end, args=(finished,), name="gnomon-ending", daemon=True).start()
        else:
            end(finished)

    return Request(
        id=f"{submission.id}/{index}",
        prompt_ids=ids,
        sampling=params,
        stream_index=index,
        fuse=stages.fuse,
        bias=stages.bias,
        mask=stages.mask,
        on_token=on_token,
        on_prompt=session.on_prompt if echo else None,
        on_finish=on_finish,
        ready=session.ready if session.waiting else always,
        sides=tuple((sides or {}).values()),
        side_names=tuple(sides or {}),
    )
