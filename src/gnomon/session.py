"""TextSession: one choice's tokens in, safe text out.

Owns the incremental detokeniser and the StreamStages that stand behind the engine's `on_token` call (stop strings,
guard, reask). Tokens past a cut never appear in text, usage or logprobs. Runs on the engine's thread; knows nothing
of queues, servers or other choices.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from gnomon.engine.request import Decision, Finished, PromptLogprob, TokenEvent
from gnomon.generation import Chunk, FinishReason, TokenLogprob, Usage
from gnomon.models.tokenizer import Tokenizer
from gnomon.stages import Released, StreamStage, TokenGate


@dataclass(frozen=True)
class SessionInfo:
    """What every chunk of one choice carries."""

    id: str
    index: int
    seed: int
    fingerprint: str


class _Pending(NamedTuple):
    """A token whose text lies at [begin, end) of the detokenised text and is not reported yet."""

    begin: int
    end: int
    event: TokenEvent


class TextSession:
    """Turns token events into chunks and decides when the text ends."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stages: Sequence[StreamStage],
        info: SessionInfo,
        emit: Callable[[Chunk], None],
        *,
        want_logprobs: bool = False,
        skip_special_tokens: bool = True,
        echo: str = "",
        healed: str = "",
        gate: TokenGate | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.stages = list(stages)
        self.info = info
        self.emit = emit
        self.want_logprobs = want_logprobs
        self.shown: frozenset[int] = getattr(gate, "shown", frozenset())  # control tokens that are text in this answer
        self.detokenizer = tokenizer.detokenizer(skip_special_tokens=skip_special_tokens, shown=self.shown)
        self.length = 0  # characters detokenised so far
        self.settled = [0] * len(self.stages)  # per stage: characters of its input that are decided
        self.pending: deque[_Pending] = deque()  # tokens not yet reported
        self.reported_tokens = 0
        self.reason: FinishReason | None = None
        self.prompt_logprobs: list[TokenLogprob] | None = None
        self.echo = echo
        self.shifted = False  # whether a stage before the last changed lengths, so that places cannot be compared
        self.private = False  # whether tokens were drawn that may be shown nowhere
        self.unreported = len(healed)  # characters of the prompt's end that are generated again
        self.gate = gate
        self.released = ""  # what left so far; kept for the gate alone
        self.held: deque[TokenEvent] = deque()  # tokens that the gate may still take back
        self.waiting: list[Any] = [stage for stage in self.stages if getattr(stage, "waits", False)]
        self.skip_special_tokens = skip_special_tokens
        self.held_characters = 0  # as last told
        self.goer: Any = next((stage for stage in self.stages if getattr(stage, "goes_back", False)), None)
        self.fresh = [copy.deepcopy(stage) for stage in self.stages if stage is not self.goer] if self.goer else []
        self.kept_ids: list[int] = []  # all tokens of the text, for going back alone

    def ready(self) -> bool:
        """Whether the next token may be computed: no stage is too far behind the text."""
        return not any(stage.behind for stage in self.waiting)

    def on_prompt(self, prompt: Sequence[PromptLogprob]) -> None:
        """Log-probabilities of the prompt's own tokens, before the first token."""
        self.prompt_logprobs = [
            describe_token(self.tokenizer, item.token_id, item.logprob, item.top) for item in prompt
        ]

    def on_token(self, event: TokenEvent) -> Decision:
        """One sampled token: ask the gate, if there is one; what it lets through becomes text."""
        if self.gate is None:
            return self._to_text(event)
        ruling = self.gate.judge(event)
        if ruling.rollback:
            for _ in range(ruling.rollback - 1):
                self.held.pop()
            return Decision.rollback(ruling.rollback)
        if self.want_logprobs and event.ends != "stop":
            event = replace(event, trace={**(event.trace or {}), **self.gate.note()})
        self.held.append(event)
        decision = self._let_through(len(self.held) - ruling.hold)
        if decision.kind == "continue" and ruling.finish is not None:
            decision = self._let_through(len(self.held))
            return Decision.finish(ruling.finish) if decision.kind == "continue" else decision
        return decision

    def _let_through(self, count: int) -> Decision:
        for _ in range(count):
            decision = self._to_text(self.held.popleft())
            if decision.kind != "continue":
                self.held.clear()
                return decision
        return Decision.CONTINUE

    def _to_text(self, event: TokenEvent) -> Decision:
        """A token that stays: pass its text through the stages, let out what may leave. An end token is no text."""
        if event.ends == "stop":
            return Decision.CONTINUE
        text = self._new_part(self.detokenizer.push(event.token_id))
        self._add(event, text)
        if self.goer is not None:
            self.kept_ids.append(event.token_id)
            self.goer.token_ends_at(self.length)
        released = self._through(text) if text else Released()
        if released.back_to is not None:
            return self._go_back(released, released.back_to)
        self._hide(released.hidden)
        if released.cut is not None:
            self._end_at(released)
            self._send(released, len(self.pending))
            return Decision.finish(released.reason)
        self._send(released, self._settled_tokens())
        return Decision.CONTINUE

    def _go_back(self, released: Released, place: int) -> Decision:
        """Take back the tokens whose text lies after `place` (halves of characters too), and all that has seen it."""
        kept = deque(p for p in self.pending if p.end < place or p.begin < p.end == place)
        count = len(self.pending) - len(kept)
        self.pending = kept
        del self.kept_ids[-count:]
        skip = self.skip_special_tokens
        self.detokenizer = self.tokenizer.detokenizer(skip_special_tokens=skip, shown=self.shown)
        text = "".join(map(self.detokenizer.push, self.kept_ids))
        self.length = len(text)
        before = [copy.deepcopy(stage) for stage in self.fresh]
        for number, stage in enumerate(before):
            text = stage.push(text).text
            self.settled[number] = len(text)
        self.stages = [*before, self.goer]
        self.goer.go_back(text)
        self._send(released, self._settled_tokens())
        return Decision.rollback(count + len(self.held))

    def on_finish(self, finished: Finished) -> Chunk:
        """The engine is done with this choice: let out what was held, and say why it ended."""
        released = Released()
        if self.held:
            self._let_through(len(self.held))
        cut = self.reason is not None
        if self.reason is None:
            self.reason = "cancelled" if finished.reason == "error" else finished.reason
            if not (self.waiting and self.reason == "cancelled"):  # nobody is there to wait for
                released = self._through(self._new_part(self.detokenizer.finish()), closing=True)
            self._hide(released.hidden)
            if released.cut is not None:
                self._end_at(released)
        chunk = self._chunk(released, self._take(len(self.pending)))
        usage = Usage(finished.prompt_tokens, self.reported_tokens, finished.cached_tokens, finished.details)
        outcome = None
        if self.gate is not None:
            outcome = self.gate.outcome(self.released + released.text, self.reported_tokens, cut=cut)
        return replace(chunk, finish_reason=self.reason, usage=usage, outcome=outcome)

    def _new_part(self, text: str) -> str:
        """Without what the prompt has already."""
        skipped = min(self.unreported, len(text))
        self.unreported -= skipped
        return text[skipped:]

    def _add(self, event: TokenEvent, text: str) -> None:
        begin, self.length = self.length, self.length + len(text)
        self.pending.append(_Pending(begin, self.length, event))

    def _through(self, text: str, *, closing: bool = False) -> Released:
        """Push text through the stages in order; a stage that ends the text closes those behind it.

        Places are compared across stages, so one that changes the text's length (the guard) stands last.
        """
        findings: tuple[Mapping[str, Any], ...] = ()
        hidden: tuple[tuple[int, int], ...] = ()
        cut: int | None = None
        back_to: int | None = None
        held: int | None = None
        reason: Literal["stop", "content_filter"] = "stop"
        for place, stage in enumerate(self.stages):
            results = [stage.push(text)] if text else []
            if closing and not (results and results[0].cut is not None):
                results.append(stage.finish())
            text = "".join(result.text for result in results)
            for result in results:
                findings += result.findings
                hidden += result.hidden
                back_to = result.back_to
                held = held if result.held is None else result.held
                decided = len(result.text) if result.settled is None else result.settled
                self.settled[place] += decided
                self.shifted |= place < len(self.stages) - 1 and decided != len(result.text) and result.cut is None
                if result.cut is not None:
                    cut, reason, closing = result.cut, result.reason, True
            if not text and not closing:
                break
        return Released(text, cut=cut, reason=reason, findings=findings, hidden=hidden, held=held, back_to=back_to)

    def _end_at(self, released: Released) -> None:
        """The text ends at released.cut: tokens that lie wholly past it never happened."""
        self.reason = released.reason
        cut = released.cut or 0
        if released.reason == "content_filter":  # a token that reaches into the blocked part would tell of it
            self.private = True
            self.pending = deque(p for p in self.pending if p.end <= cut and p.begin < cut)
            return
        self.pending = deque(p for p in self.pending if p.begin < cut or (p.begin == p.end and p.end < cut))

    def _hide(self, spans: Sequence[tuple[int, int]]) -> None:
        """Tokens that spell replaced text are counted, and reported nowhere."""
        if not spans:
            return
        self.private = True
        shown = deque(p for p in self.pending if not any(_overlaps(p, start, end) for start, end in spans))
        if self.shifted:
            shown = deque()  # which token spells what is not known: none of them is told
        self.reported_tokens += len(self.pending) - len(shown)
        self.pending = shown

    def _settled_tokens(self) -> int:
        """How many pending tokens have all their text decided by every stage."""
        limit = min(self.settled, default=self.length)
        if self.goer is not None:  # a token without text goes with what follows it
            return sum(1 for p in self.pending if p.end < limit or p.begin < p.end == limit)
        return sum(1 for p in self.pending if p.end <= limit)

    def _take(self, count: int) -> list[TokenEvent]:
        self.reported_tokens += count
        return [self.pending.popleft().event for _ in range(count)]

    def _send(self, released: Released, token_count: int) -> None:
        tokens = self._take(token_count)
        if self.gate is not None:
            self.released += released.text
        if released.text or tokens or released.findings or released.held not in (None, self.held_characters):
            self.emit(self._chunk(released, tokens))

    def _described(self, event: TokenEvent) -> TokenLogprob:
        described = describe_token(self.tokenizer, event.token_id, event.logprob, event.top)
        return replace(described, trace=event.trace) if event.trace else described

    def _chunk(self, released: Released, tokens: list[TokenEvent]) -> Chunk:
        prompt, self.prompt_logprobs = self.prompt_logprobs, None
        echo, self.echo = self.echo, ""
        held = released.held if released.held != self.held_characters else None
        self.held_characters = self.held_characters if held is None else held
        return Chunk(
            id=self.info.id,
            index=self.info.index,
            text=echo + released.text,
            token_ids=[event.token_id for event in tokens],
            logprobs=[self._described(event) for event in tokens] if self.want_logprobs else None,
            prompt_logprobs=prompt,
            seed=self.info.seed,
            fingerprint=self.info.fingerprint,
            findings=released.findings,
            held=held,
        )


def _overlaps(token: _Pending, start: int, end: int) -> bool:
    if token.begin == token.end:
        return start <= token.begin < end
    return token.begin < end and token.end > start


def describe_token(
    tokenizer: Tokenizer, token_id: int, logprob: float | None, top: Sequence[tuple[int, float]] = ()
) -> TokenLogprob:
    """A token with its text, bytes and alternatives."""
    alternatives = tuple(describe_token(tokenizer, other, value) for other, value in top)
    return TokenLogprob(
        token_id, tokenizer.token_text(token_id), tokenizer.token_bytes(token_id), logprob, alternatives
    )
