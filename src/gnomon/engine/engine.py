"""The engine: requests in, tokens out, one ragged batch per step.

Knows token ids only. A request's tokens and log-probabilities depend on its prompt, parameters and seed alone: never
on its neighbours, the chunking, cache hits or preemption. Not thread-safe: worker.py gives it a thread of its own.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Literal

import torch
from torch import Tensor

from gnomon.engine.drafting import Drafter, PromptLookup, certain
from gnomon.engine.logprobs import Logprobs
from gnomon.engine.pages import PagePool
from gnomon.engine.reader import Reader
from gnomon.engine.request import Decision, Finished, FinishReason, PromptLogprob, Request, TokenEvent
from gnomon.engine.runner import Rows, Runner
from gnomon.engine.sampler import Draw, RequestSampler
from gnomon.engine.scheduler import Scheduler, Work
from gnomon.engine.sentinel import Sentinel
from gnomon.engine.sequence import Sequence
from gnomon.errors import ContextLengthExceeded, EngineFailure, GnomonError, OutOfMemory, PromptError
from gnomon.kernels.batch import PAGE, Span
from gnomon.kernels.side import SidePath

MOST_DRAFTING = 4
"""Sequences in a batch up to which drafts pay: beyond, the rows of a step are used by the sequences themselves."""
CHECKED_LOGITS = 4096
"""Logits of a row that its checksum covers: enough to see any other hidden state, in some microseconds."""
log = logging.getLogger("gnomon.engine")


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and what is in the engine now."""

    running: int
    waiting: int
    pages_used: int
    pages_total: int
    steps: int
    largest_batch: int
    cached_tokens: int
    preemptions: int
    draft_tokens: int = 0
    accepted_tokens: int = 0
    sentinel_replays: int = 0
    sentinel_mismatches: int = 0


class Engine:
    """Requests, a scheduler, a runner."""

    def __init__(
        self,
        runner: Runner,
        *,
        fingerprint: str = "",
        max_sequences: int = 64,
        token_budget: int = 256,
        drafter: Callable[[], Drafter] | None = PromptLookup,
        sentinel_every: int = 0,
    ) -> None:
        self.runner = runner
        self.drafter = drafter if getattr(runner, "accepts_drafts", runner.shares_pages) else None
        self.pool = PagePool(runner.page_count, fingerprint)
        self.scheduler = Scheduler(
            self.pool,
            max_sequences=max_sequences,
            token_budget=token_budget,
            copy_page=runner.copy_page if runner.shares_pages else None,
        )
        self.sequences: dict[str, Sequence] = {}
        self.steps = 0
        self.largest_batch = 0
        self.sentinel = Sentinel(sentinel_every if runner.shares_pages else 0)
        self.draft_tokens = 0
        self.accepted_tokens = 0
        self._arrivals = 0

    @torch.inference_mode()
    def step(self) -> bool:
        """Compute one batch. False when there was nothing to do."""
        self._drop_cancelled()
        self._ask_who_is_ready()
        self._draft()
        work = self.scheduler.schedule()
        if not work:
            return False
        rows = self._run(work)
        for (sequence, count), result in zip(work, rows, strict=False):
            if isinstance(result, Tensor):
                self._advance(sequence, count, result)
            elif result is None:
                sequence.computed += count - 1  # its last token is asked for again in the next step
            else:
                self._stopped_by_runner(sequence, result)
        return True

    def submit(self, request: Request) -> None:
        """Take a request. Raises what `check` raises."""
        self.check(request)
        self._arrivals += 1
        keys = self.pool.chain(request.prompt_ids, request.page_salt) if self.runner.shares_pages else []
        sampler = RequestSampler(request, self.runner.vocab_size)
        sequence = Sequence(self._arrivals, request, sampler, keys)
        sequence.drafter = self.drafter() if self.drafter is not None else None
        self.sequences[request.id] = sequence
        self.scheduler.add(sequence)
        self.sentinel.admit(request)

    def check(self, request: Request) -> None:
        """Raises PromptError, ContextLengthExceeded or OutOfMemory for a request that could never run."""
        prompt, most = request.prompt_ids, self.runner.max_context
        self.check_prompt(prompt)
        total = len(prompt) + request.sampling.max_tokens
        if total > most:
            raise ContextLengthExceeded(
                f"The prompt's {len(prompt)} tokens and max_tokens {request.sampling.max_tokens} make {total}; "
                f"the context holds {most}.",
                param="max_tokens",
            )
        pages = -(-total // PAGE)
        if pages > self.pool.count:
            raise OutOfMemory(
                f"{total} tokens need {pages} pages of keys and values; the engine has {self.pool.count}.",
                hint="Lower max_tokens, or give the engine more kv_memory.",
                param="max_tokens",
            )

    def check_prompt(self, prompt: list[int]) -> None:
        if not prompt:
            raise PromptError("The prompt is empty.", param="prompt")
        size = self.runner.vocab_size
        bad = next((token for token in prompt if not 0 <= token < size), None)
        if bad is not None:
            raise PromptError(f"Token id {bad} is outside the vocabulary 0..{size - 1}.", param="prompt")

    def cancel(self, request_id: str) -> None:
        """End a request before the next step; unknown or finished ones are ignored."""
        if (sequence := self.sequences.get(request_id)) is not None:
            sequence.cancelled = True

    def cancel_all(self) -> None:
        """End every request now."""
        for sequence in self.sequences.values():
            sequence.cancelled = True
        self._drop_cancelled()

    def stats(self) -> EngineStats:
        s = self.scheduler
        return EngineStats(
            running=len(s.running),
            waiting=len(s.waiting),
            pages_used=self.pool.used,
            pages_total=self.pool.count,
            steps=self.steps,
            largest_batch=self.largest_batch,
            cached_tokens=s.cached_tokens,
            preemptions=s.preemptions,
            draft_tokens=self.draft_tokens,
            accepted_tokens=self.accepted_tokens,
            sentinel_replays=self.sentinel.replays,
            sentinel_mismatches=self.sentinel.mismatches,
        )

    def weights_changed(self, fingerprint: str) -> None:
        """Nothing computed with the old weights may be used again; running requests start over."""
        self.sentinel.forget()
        for sequence in list(self.scheduler.running):
            self.scheduler.remove(sequence)
            sequence.prompt_logprobs.clear()
            sequence.keys = []
            self.scheduler.add(sequence)
        self.pool.flush(fingerprint)

    def logits(self, token_ids: list[int], sides: tuple[SidePath, ...] = ()) -> Tensor:
        """Logits after every token of a text -> [T, V]. sides: patches that run beside the weights."""
        found: list[Tensor] = []
        for piece in self._pieces(token_ids, "all", sides):
            (rows,) = self.runner.step([piece])
            if not isinstance(rows, Tensor):
                raise rows or EngineFailure("The runner gave no logits for a text that wants them all.")
            found.append(rows)
        return torch.cat(found)

    def hidden(self, token_ids: list[int], sides: tuple[SidePath, ...] = ()) -> Tensor:
        """Final hidden states of a text -> [T, C]."""
        pieces = self._pieces(token_ids, "none", sides)
        return torch.cat([rows for piece in pieces for rows in self.runner.hidden([piece])])

    def reader(self) -> Reader:
        """Eyes for a text that grows; to be closed."""
        self._arrivals += 1
        return Reader(self, self._arrivals)

    def _pieces(self, token_ids: list[int], wants: str, sides: tuple[SidePath, ...]) -> Iterator[Span]:
        """A text in chunks of the token budget, on pages of its own that are given back afterwards."""
        self.check_prompt(token_ids)
        if len(token_ids) > self.runner.max_context:
            raise ContextLengthExceeded(
                f"The text has {len(token_ids)} tokens; the context holds {self.runner.max_context}.", param="input"
            )
        needed = -(-len(token_ids) // PAGE)
        if needed > self.pool.available:
            raise OutOfMemory(f"{len(token_ids)} tokens need {needed} pages; {self.pool.available} are free now.")
        self._arrivals += 1
        pages = [page for page in (self.pool.allocate() for _ in range(needed)) if page is not None]
        try:
            for start in range(0, len(token_ids), self.scheduler.token_budget):
                chunk = token_ids[start : start + self.scheduler.token_budget]
                yield Span(self._arrivals, chunk, start, pages, wants, sides)
        finally:
            self.pool.release(pages)
            self.runner.release(self._arrivals)

    def _run(self, work: Work) -> Iterable[Rows]:
        """The batch through the runner; if that fails, its requests end with the failure and the engine lives on."""
        self.steps += 1
        self.largest_batch = max(self.largest_batch, len(work))
        try:
            return self.runner.step([sequence.span(count) for sequence, count in work])
        except Exception as error:
            log.exception("A step of %d sequences failed", len(work))
            failure = EngineFailure(f"A step of the engine failed: {type(error).__name__}: {error}.")
            for sequence, _ in work:
                self._finish(sequence, "error", failure)
            return []

    def _stopped_by_runner(self, sequence: Sequence, error: GnomonError) -> None:
        """The runner cannot go on with this request; a context that is full after some text is an ordinary end."""
        full = isinstance(error, ContextLengthExceeded) and bool(sequence.sampler.generated)
        if full:
            self._finish(sequence, "length")
        else:
            self._finish(sequence, "error", error)

    def _ask_who_is_ready(self) -> None:
        """A request that is not ready is passed over in this step."""
        for sequence in list(self.sequences.values()):
            try:
                sequence.paused = not sequence.request.ready()
            except Exception as error:
                log.exception("Request %s failed", sequence.request.id)
                self._finish(sequence, "error", EngineFailure(f"The request failed: {type(error).__name__}: {error}."))

    @property
    def paused(self) -> bool:
        """Whether some request was not ready: it is asked again with the next step."""
        return any(sequence.paused for sequence in self.sequences.values())

    def _draft(self) -> None:
        """What the decoding sequences will say next: what their stages force, and guesses while there is room."""
        running = self.scheduler.running
        share = self.scheduler.token_budget // max(1, len(running)) - 1
        for sequence in running:
            if sequence.paused or sequence.drafter is None or sequence.pending != 1 or not sequence.sampler.generated:
                continue
            left = sequence.request.sampling.max_tokens - len(sequence.sampler.generated) - 1
            sequence.drafts = certain(sequence.request.mask, min(left, share))
            sequence.guessed = not sequence.drafts
            if sequence.drafts or len(running) > MOST_DRAFTING:
                continue
            if (most := min(left, sequence.draft_length.next())) > 0:
                guesses = sequence.drafter.propose(sequence.tokens, most, sequence.sampler.guess)
                sequence.drafts = list(takewhile(lambda token: 0 <= token < self.runner.vocab_size, guesses))

    def _advance(self, sequence: Sequence, count: int, logits_RV: Tensor) -> None:
        """Book a sequence's computed tokens; when all are, draw the next one."""
        try:
            drafts, sequence.drafts = sequence.drafts, []
            count -= len(drafts)
            self._note_prompt(sequence, count, logits_RV)
            before = sequence.full_pages
            sequence.computed += count
            for place in range(before, min(sequence.full_pages, len(sequence.keys))):
                ids = sequence.tokens[place * PAGE : (place + 1) * PAGE]
                self.pool.keep(sequence.pages[place], sequence.keys[place], ids)
            if sequence.pending == 0:
                self._generate(sequence, logits_RV[-1 - len(drafts)])
                self._confirm(sequence, drafts, logits_RV)
        except GnomonError as error:
            self._finish(sequence, "error", error)
        except Exception as error:
            log.exception("Request %s failed", sequence.request.id)
            self._finish(sequence, "error", EngineFailure(f"The request failed: {type(error).__name__}: {error}."))

    def _confirm(self, sequence: Sequence, drafts: list[int], logits_RV: Tensor) -> None:
        """As long as the drawn token is the guessed one, the row after it is computed already: draw from it too."""
        accepted, length = 0, len(sequence.tokens)
        for place, draft in enumerate(drafts):
            alive = sequence.request.id in self.sequences
            if not alive or len(sequence.tokens) != length + place or sequence.tokens[-1] != draft:
                break
            accepted += 1
            sequence.computed += 1
            self._generate(sequence, logits_RV[place - len(drafts)])
        if drafts:
            if sequence.guessed:
                sequence.draft_length.learn(len(drafts), accepted)
            self.draft_tokens += len(drafts)
            self.accepted_tokens += accepted

    def _generate(self, sequence: Sequence, logits_V: Tensor) -> None:
        """Draw a token, tell the request, do as it decides."""
        params = sequence.request.sampling
        if params.max_tokens == 0:
            self._finish(sequence, "length")
            return
        checksum = zlib.crc32(logits_V[:CHECKED_LOGITS].numpy().tobytes())
        draw: Draw = sequence.sampler.draw(logits_V)
        if self.sentinel.watches(sequence.request):
            self.sentinel.drawn(sequence, draw.token_id, checksum)
        index = len(sequence.sampler.generated)
        sequence.sampler.accept(draw.token_id)
        sequence.tokens.append(draw.token_id)
        ends: Literal["stop", "length"] | None = None
        if draw.token_id in params.ends:
            ends = "stop"
        elif index + 1 == params.max_tokens:
            ends = "length"
        event = TokenEvent(sequence.request.id, index, draw.token_id, draw.logprob, draw.top, ends, checksum)
        decision: Decision = sequence.request.on_token(event)
        if decision.kind == "rollback":
            self._roll_back(sequence, decision.count)
        elif decision.kind != "continue":
            self._finish(sequence, decision.reason or "stop", decision.error)
        elif ends is not None:
            self._finish(sequence, ends)

    def _roll_back(self, sequence: Sequence, count: int) -> None:
        """Forget the last tokens; their keys and values are overwritten when the positions are computed again."""
        if not 0 < count <= len(sequence.sampler.generated):
            raise EngineFailure(
                f"A rollback of {count} tokens, where {len(sequence.sampler.generated)} were generated."
            )
        sequence.sampler.rollback(count)
        del sequence.tokens[-count:]
        sequence.computed = min(sequence.computed, len(sequence.tokens) - 1)

    def _note_prompt(self, sequence: Sequence, count: int, logits_RV: Tensor) -> None:
        """Log-probabilities of the prompt's own tokens, delivered before the first generated one."""
        request = sequence.request
        alternatives, end = request.sampling.prompt_logprobs, len(request.prompt_ids)
        if alternatives is None or sequence.computed >= end:
            return
        noted = sequence.prompt_logprobs
        if sequence.computed == 0:
            noted.append(PromptLogprob(request.prompt_ids[0], None))
        for row, following in enumerate(range(sequence.computed + 1, sequence.computed + count + 1)):
            if following < end:
                token = request.prompt_ids[following]
                logprobs = Logprobs.of(logits_RV[row].numpy(), alternatives)
                noted.append(PromptLogprob(token, logprobs.of_token(token), logprobs.top))
        if sequence.computed + count >= end and request.on_prompt is not None and not sequence.sampler.generated:
            request.on_prompt(list(noted))

    def _drop_cancelled(self) -> None:
        for sequence in [s for s in self.sequences.values() if s.cancelled]:
            self._finish(sequence, "cancelled")

    def _finish(self, sequence: Sequence, reason: FinishReason, error: GnomonError | None = None) -> None:
        """Free everything, then tell the request; called once per request."""
        if self.sequences.pop(sequence.request.id, None) is None:
            return
        self.scheduler.remove(sequence)
        self.runner.release(sequence.number)
        if sequence.drafter is not None:
            sequence.drafter.close()
        finished = Finished(
            reason,
            error,
            prompt_tokens=len(sequence.request.prompt_ids),
            completion_tokens=len(sequence.sampler.generated),
            cached_tokens=sequence.cached_tokens,
        )
        _tell(sequence.request.on_finish, finished)
        if (repetition := self.sentinel.ended(sequence, finished)) is not None:
            self.submit(repetition)


def _tell(on_finish: Callable[[Finished], None], finished: Finished) -> None:
    try:
        on_finish(finished)
    except Exception:
        log.exception("on_finish failed")  # it is the caller's; the engine goes on
