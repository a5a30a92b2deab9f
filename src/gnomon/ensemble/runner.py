"""EnsembleRunner: several members behind one virtual vocabulary, as the engine's Runner.

Spans of symbols in, rows over symbols out. The engine schedules, samples and cancels as with any model; per text the
members' own tokens follow by incremental re-tokenisation. What a text's row is depends on its symbols and its request's
policy alone, never on neighbours, chunks or what is cached.
Legend: S symbols, V a member's vocabulary, R rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gnomon.engine.runner import Rows
from gnomon.ensemble.member import Job, Member
from gnomon.ensemble.options import Policy
from gnomon.ensemble.prompts import understand
from gnomon.ensemble.retokenize import GrowingText
from gnomon.ensemble.symbols import Symbols
from gnomon.ensemble.told import Told
from gnomon.ensemble.union import UnionCore
from gnomon.errors import EngineFailure, GnomonError, UnsupportedModel
from gnomon.kernels.batch import PAGE, Span

log = logging.getLogger("gnomon.ensemble")


@dataclass
class Text:
    """One sequence: its symbols, and each member's view of it."""

    sequence: int
    told: Told
    symbols: list[int] = field(default_factory=list)
    prompts: list[list[int]] | None = None
    begun: int = 0
    growing: list[GrowingText] = field(default_factory=list)
    logits: dict[int, Tensor] = field(default_factory=dict)

    def ids(self, member: int, data: bytes) -> list[int]:
        assert self.prompts is not None
        return self.prompts[member] + self.growing[member].update(data)


class EnsembleRunner:
    """Implements `Runner` for the union and topk cores."""

    shares_pages = False

    def __init__(
        self,
        members: Sequence[Member],
        core: UnionCore,
        policy: Policy,
        *,
        token_budget: int = 256,
        max_sequences: int = 64,
        on_failure: str = "fail",
    ) -> None:
        self.members = list(members)
        self.core = core
        self.symbols: Symbols = core.symbols
        self.policy = policy
        self.token_budget = token_budget
        self.on_failure = on_failure
        self.vocab_size = self.symbols.size
        self.max_context = min(member.max_context for member in members)
        # Symbols take no memory: it is the members' pages that count.
        self.page_count = max_sequences * -(-self.max_context // PAGE)
        self.texts: dict[int, Text] = {}

    def step(self, spans: list[Span]) -> list[Rows]:
        results: list[Rows] = [None] * len(spans)
        asked: list[tuple[int, Text]] = []
        for place, span in enumerate(spans):
            try:
                text = self._hear(span)
                if span.wants == "none":
                    results[place] = torch.empty(0, self.vocab_size)
                elif span.wants == "all":
                    results[place] = self._every_row(text, span)
                else:
                    self._understand(text)
                    asked.append((place, text))
            except GnomonError as error:
                results[place] = error
        for (place, _), row in zip(asked, self._rows([text for _, text in asked]), strict=True):
            results[place] = row[None] if isinstance(row, Tensor) else row
        return results

    def hidden(self, spans: list[Span]) -> list[Tensor]:
        raise UnsupportedModel("An ensemble has no hidden states of its own.", hint="Embed with one of its members.")

    def release(self, sequence: int) -> None:
        self.texts.pop(sequence, None)
        for member in self.members:
            member.release(sequence)

    # -- one text -----------------------------------------------------------------------------------------------

    def _hear(self, span: Span) -> Text:
        """Note a span's symbols; a span that starts earlier than what is known takes the rest back."""
        text = self.texts.get(span.sequence)
        if text is None:
            told = span.options or Told([member.name for member in self.members], self.policy)
            text = self.texts[span.sequence] = Text(span.sequence, told)
            text.growing = [GrowingText(member.retokenizer) for member in self.members]
        if text.symbols[span.start :] != span.token_ids:  # asked again for the same: what is there may stay
            if span.start < text.begun:
                text.prompts = None
            text.symbols[span.start :] = span.token_ids
            text.logits.clear()
        return text

    def _understand(self, text: Text) -> None:
        """The prompt in every member's tokens, once it is known whole."""
        if text.prompts is not None:
            return
        prompt, text.begun = understand(self.symbols, text.symbols, text.told.prompt_length)
        text.prompts = text.told.prompts or [member.prompt_ids(prompt) or member.start_ids() for member in self.members]

    def _every_row(self, text: Text, span: Span) -> Tensor:
        """A row after each of the span's symbols, one by one."""
        whole, found = list(text.symbols), []
        for end in range(span.start + 1, span.end + 1):
            text.symbols = whole[:end]
            text.logits.clear()
            if text.told.prompt_length is None or end <= text.told.prompt_length:
                text.prompts = None
            self._understand(text)
            row: Rows = None
            while row is None:
                (row,) = self._rows([text])
            if not isinstance(row, Tensor):
                raise row
            found.append(row)
        return torch.stack(found)

    # -- all texts of a step ------------------------------------------------------------------------------------

    def _rows(self, texts: Sequence[Text]) -> list[Rows]:
        """Per text its fused row [S], None while a member is not there yet, or what ended it."""
        failed: dict[int, GnomonError] = {}
        first = [(t, m) for t in texts for m in self._asked_first(t)]
        self._advance(first, failed)
        later = [(t, m) for t in texts if t.sequence not in failed for m in self._asked_later(t)]
        self._advance(later, failed)
        return [failed.get(text.sequence) or self._fused(text) for text in texts]

    def _asked_first(self, text: Text) -> list[int]:
        alive = [m for m in range(len(self.members)) if m not in text.told.dropped]
        policy = text.told.policy
        if policy.when == "every" or policy.primary not in alive:
            return [m for m in alive if policy.weights[m] > 0 or policy.fuse in ("contrastive", "proxy")]
        return [policy.primary]

    def _asked_later(self, text: Text) -> list[int]:
        """The others, where the primary's gate opens."""
        policy, told = text.told.policy, text.told
        if policy.when == "every" or policy.primary in told.dropped or policy.primary not in text.logits:
            return []
        if not self._gate_opens(text):
            return []
        return [m for m in range(len(self.members)) if m != policy.primary and m not in told.dropped]

    def _gate_opens(self, text: Text) -> bool:
        """Whether the primary is unsure enough to ask the others."""
        policy = text.told.policy
        logprobs_V = torch.log_softmax(text.logits[policy.primary], dim=-1)
        if policy.when == "gate":
            return bool(logprobs_V.max().exp() < policy.threshold)
        return bool(-(logprobs_V.exp() * logprobs_V.clamp_min(-1e4)).sum() > policy.threshold)

    def _advance(self, asked: Sequence[tuple[Text, int]], failed: dict[int, GnomonError]) -> None:
        """Bring members up to date with texts; what is there stands in text.logits afterwards."""
        for m, member in enumerate(self.members):
            texts = [text for text, who in asked if who == m and m not in text.logits and text.sequence not in failed]
            jobs = []
            for text in texts:
                data = self.symbols.text(text.symbols[text.begun :])
                assert text.prompts is not None
                prompt = len(text.prompts[m])
                jobs.append(Job(text.sequence, text.ids(m, data), prompt, text.told.salt, text.told.counters[m]))
            if not jobs:
                continue
            try:
                results = member.advance(jobs, self.token_budget)
            except Exception as error:
                log.warning("The member `%s` failed: %s", member.name, error)
                results = [_failure(member, error)] * len(jobs)
            for text, result in zip(texts, results, strict=True):
                if isinstance(result, Tensor):
                    text.logits[m] = result
                elif isinstance(result, GnomonError):
                    self._failed(text, m, result, failed)

    def _failed(self, text: Text, m: int, error: GnomonError, failed: dict[int, GnomonError]) -> None:
        others = len(self.members) - len(text.told.dropped) - 1
        if self.on_failure == "continue" and others and isinstance(error, EngineFailure):
            text.told.dropped[m] = error.message
        else:
            failed[text.sequence] = error

    def _fused(self, text: Text) -> Tensor | None:
        told, policy = text.told, text.told.policy
        alone = policy.when != "every" and policy.primary not in told.dropped
        wanted = set(self._asked_first(text))
        if alone and policy.primary in text.logits and self._gate_opens(text):
            wanted |= {m for m in range(len(self.members)) if m not in told.dropped}
        if not wanted <= text.logits.keys():
            return None
        rows = self.core.rows([text.logits.get(m) if m in wanted else None for m in range(len(self.members))])
        speaking = [m for m, row in enumerate(rows) if row is not None]
        weights = told.weights()
        if len(speaking) == 1:
            fused = rows[speaking[0]]
            assert fused is not None
        else:
            voices = [row for row in rows if row is not None]
            fused = self.core.fused(voices, policy, [weights[m] for m in speaking], masked=told.masked)
        told.steps += 1
        told.fused_steps += len(speaking) > 1
        told.fused = len(speaking) > 1
        told.votes = {len(text.symbols): lambda symbol: [None if row is None else float(row[symbol]) for row in rows]}
        return fused.clone() if any(fused is row for row in rows) else fused


def _failure(member: Member, error: Exception) -> EngineFailure:
    return EngineFailure(f"The member `{member.name}` failed: {type(error).__name__}: {error}.")
