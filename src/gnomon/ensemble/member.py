"""A member: one network with its own tokenizer, template, stop tokens, context and key-value pages.

`advance` takes each text's token ids and gives the logits after them: it keeps what is computed, crops it back to the
common beginning when a text was tokenised anew, and feeds the rest in chunks. Its caches are caches: pages of a text
that is not asked for now are given up when others need them, and computed again. Knows nothing of other members.
Legend: V the member's vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gnomon.arch.network import Network
from gnomon.engine.pages import PagePool
from gnomon.engine.runner import PagedRunner
from gnomon.ensemble.prompts import Prompt
from gnomon.ensemble.retokenize import Retokenizer
from gnomon.errors import ContextLengthExceeded, OutOfMemory
from gnomon.kernels.batch import PAGE, Span
from gnomon.kernels.side import SidePath
from gnomon.models.chat import ChatTemplate
from gnomon.models.tokenizer import Tokenizer

PLAIN_TEMPLATE = (
    "{% for m in messages %}{{ m.role | capitalize }}: {{ m.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""For a member without a template of its own: a transcript."""


MOST_EXTRA_ROWS = 16
"""Of logits that nobody asked for, computed to save a pass."""


@dataclass
class Counters:
    """What one request cost a member: forward passes it was part of, tokens fed, and tokens fed a second time."""

    forwards: int = 0
    tokens: int = 0
    refed: int = 0


@dataclass
class _Text:
    """What is computed of one text. kept: leading pages that may be shared and are never rewritten."""

    ids: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    kept: int = 0
    keys: list[bytes] = field(default_factory=list)
    fed: int = 0
    used: int = 0
    cached_prompt: int = 0


@dataclass(frozen=True)
class Job:
    """One text to advance to. prompt: how many of its ids never change again: their pages may serve others. rows: of
    how many tokens at its end the logits are wanted.
    """

    sequence: int
    ids: list[int]
    prompt: int
    salt: str = ""
    counters: Counters | None = None
    rows: int = 1


class Member:
    """See the module's words."""

    def __init__(
        self,
        name: str,
        network: Network,
        tokenizer: Tokenizer,
        *,
        fingerprint: str,
        chat_template: str | None = None,
        page_count: int = 64,
        max_context: int | None = None,
        sides: tuple[SidePath, ...] = (),
    ) -> None:
        self.name = name
        self.network = network
        self.tokenizer = tokenizer
        self.fingerprint = fingerprint
        self.sides = sides
        self.retokenizer = Retokenizer(tokenizer)
        self.max_context = min(network.max_context, max_context or network.max_context)
        self.has_template = chat_template is not None
        self.template = _template(chat_template or PLAIN_TEMPLATE, tokenizer)
        self.runner = PagedRunner(network, page_count=page_count, max_context=self.max_context)
        self.pool = PagePool(page_count, fingerprint)
        self._texts: dict[int, _Text] = {}
        self._clock = 0

    @property
    def stops(self) -> frozenset[int]:
        return self.tokenizer.eos_token_ids

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """The prompt in this member's own tokens: BOS where it has one; a conversation through its template."""
        if prompt.messages is not None:
            return self.template.render_ids(self.tokenizer, list(prompt.messages), **dict(prompt.variables))
        try:
            return self.tokenizer.encode(prompt.text.decode("utf-8"))
        except UnicodeDecodeError:
            start = [self.tokenizer.bos_token_id] if self.tokenizer.add_bos else []
            return [i for i in start if i is not None] + self.retokenizer.ids(prompt.text)

    def start_ids(self) -> list[int]:
        """Ids before a text that has no prompt: BOS, or where there is none the token that ends texts."""
        bos = self.tokenizer.bos_token_id
        return [bos if bos is not None else min(self.stops, default=0)]

    def advance(self, jobs: Sequence[Job], budget: int) -> list[Tensor | Exception | None]:
        """Bring texts up to date, earlier jobs first, within `budget` tokens -> logits after each ([V], or [rows, V]
        for a job of several rows), None: not yet.

        Sequences of the jobs are distinct. The first job always makes progress.
        """
        results: list[Tensor | Exception | None] = [None] * len(jobs)
        spans: list[tuple[int, Span]] = []
        self._clock += 1
        for place, job in enumerate(jobs):
            if budget <= 0:
                break
            if len(job.ids) > self.max_context:
                results[place] = self._too_long(job)
                continue
            span = self._plan(job, budget, protected={j.sequence for j in jobs[: place + 1]})
            if span is None:
                if not spans and self.pool.count * PAGE < len(job.ids):
                    results[place] = OutOfMemory(
                        f"{len(job.ids)} tokens do not fit into the pages of `{self.name}`.",
                        hint="Give more kv_memory.",
                    )
                    continue
                break
            budget -= len(span.token_ids)
            spans.append((place, span))
        if spans:
            for (place, span), rows in zip(spans, self.runner.step([span for _, span in spans]), strict=True):
                self._book(jobs[place], span)
                if span.wants != "none":
                    results[place] = rows[-1] if jobs[place].rows == 1 else rows[-jobs[place].rows :]
        return results

    def rows(self, ids: Sequence[int], budget: int) -> list[Tensor]:
        """Logits after every token of a text [T, V], in chunks; its pages are given back at the end."""
        sequence = -1 - self._clock
        found: list[Tensor] = []
        text = self._texts[sequence] = _Text(used=self._clock + 1)
        try:
            self._reserve(text, len(ids), {sequence})
            for start in range(0, len(ids), budget):
                chunk = list(ids[start : start + budget])
                found += [
                    row
                    for rows in self.runner.step([Span(sequence, chunk, start, text.pages, "all", self.sides)])
                    for row in rows
                ]
        finally:
            self.release(sequence)
        return found

    def prompt_bits(self, ids: Sequence[int], budget: int) -> float:
        """Bits per byte of a prompt's own tokens, the first one apart; 0 when there is nothing to judge by."""
        size = sum(len(self.retokenizer.texts[token]) for token in ids[1:])
        if not size:
            return 0.0
        rows = self.rows(ids, budget)
        spent = [torch.logsumexp(row, 0) - row[token] for row, token in zip(rows, ids[1:], strict=False)]
        return float(sum(spent)) / math.log(2) / size

    def release(self, sequence: int) -> None:
        """This text is over."""
        if (text := self._texts.pop(sequence, None)) is not None:
            self.pool.release(text.pages)
            self.runner.release(sequence)

    def cached_prompt(self, sequence: int) -> int:
        """Tokens of this text's prompt that were computed for an earlier one."""
        return self._texts[sequence].cached_prompt if sequence in self._texts else 0

    def flush(self, fingerprint: str) -> None:
        """The weights changed."""
        for sequence in list(self._texts):
            self.release(sequence)
        self.pool.flush(fingerprint)
        self.fingerprint = fingerprint

    def _plan(self, job: Job, budget: int, protected: set[int]) -> Span | None:
        """The next span of a text: from where it differs from what is computed. None: no pages for it now."""
        text = self._texts.get(job.sequence)
        if text is None:
            text = self._texts[job.sequence] = self._begin(job)
        text.used = self._clock
        common = min(_common(text.ids, job.ids), len(job.ids) - job.rows)
        if common < text.kept * PAGE:
            self.pool.release(text.pages)  # the prompt itself changed: nothing of it may be rewritten in place
            text.pages, text.kept, text.keys, common = [], 0, [], 0
        text.ids = list(job.ids[:common])
        count = min(budget, len(job.ids) - common)
        if job.rows > 1:  # rows of one pass, and no others but few
            backlog = len(job.ids) - common - job.rows
            count = min(budget, backlog) if backlog > MOST_EXTRA_ROWS else len(job.ids) - common
        if not self._reserve(text, common + count, protected):
            return None
        wants = "none" if common + count < len(job.ids) else "last" if job.rows == 1 else "all"
        ids = list(job.ids[common : common + count])
        return Span(job.sequence, ids, common, list(text.pages), wants, self.sides)

    def _begin(self, job: Job) -> _Text:
        keys = self.pool.chain(job.ids[: job.prompt], job.salt) if self.runner.shares_pages else []
        usable = (len(job.ids) - job.rows) // PAGE
        pages = self.pool.find(keys[:usable], job.ids)
        computed = len(pages) * PAGE
        return _Text(list(job.ids[:computed]), pages, len(pages), keys, fed=computed, cached_prompt=computed)

    def _book(self, job: Job, span: Span) -> None:
        text = self._texts[job.sequence]
        text.ids += span.token_ids
        if job.counters is not None:
            job.counters.forwards += 1
            job.counters.tokens += len(span.token_ids)
            job.counters.refed += max(0, text.fed - span.start)
        text.fed = max(text.fed, span.end)
        while text.kept < len(text.keys) and (text.kept + 1) * PAGE <= len(text.ids):
            place = text.kept
            self.pool.keep(text.pages[place], text.keys[place], text.ids[place * PAGE : (place + 1) * PAGE])
            text.kept += 1

    def _reserve(self, text: _Text, length: int, protected: set[int]) -> bool:
        while len(text.pages) * PAGE < length:
            page = self.pool.allocate()
            if page is not None:
                text.pages.append(page)
            elif not self._give_up_one(protected):
                return False
        return True

    def _give_up_one(self, protected: set[int]) -> bool:
        """Drop what is computed of the text that was asked for least recently."""
        others = [(text.used, number) for number, text in self._texts.items() if number not in protected and text.pages]
        if not others:
            return False
        self.release(min(others)[1])
        return True

    def _too_long(self, job: Job) -> ContextLengthExceeded:
        return ContextLengthExceeded(
            f"The text has {len(job.ids)} tokens for the member `{self.name}`; its context holds {self.max_context}.",
            param="max_tokens",
        )


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(a), len(b))
    if a[:shorter] == b[:shorter]:
        return shorter
    return next(place for place in range(shorter) if a[place] != b[place])


def _template(source: str, tokenizer: Tokenizer) -> ChatTemplate:
    bos, eos = tokenizer.bos_token_id, min(tokenizer.eos_token_ids, default=None)
    return ChatTemplate(
        source,
        bos_token=tokenizer.token_text(bos) if bos is not None else "",
        eos_token=tokenizer.token_text(eos) if eos is not None else "",
    )
