"""What the runners behind a virtual vocabulary share: spans of symbols in, rows over symbols out.

The engine schedules, samples and cancels as with any model. A runner of ours says how a text is understood and how rows
come about; this keeps the texts, takes symbols back, and books members that fail.
Legend: S symbols.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from gnomon.engine.runner import Rows
from gnomon.ensemble.member import Job, Member
from gnomon.ensemble.options import Policy
from gnomon.ensemble.symbols import Symbols
from gnomon.ensemble.told import Told
from gnomon.errors import EngineFailure, GnomonError, UnsupportedModel
from gnomon.kernels.batch import PAGE, Span

log = logging.getLogger("gnomon.ensemble")


@dataclass
class SymbolText:
    """One sequence. begun: where generation begins. prompts: its prompt in every member's tokens, once understood."""

    sequence: int
    told: Told
    symbols: list[int] = field(default_factory=list)
    begun: int = 0
    prompts: list[list[int]] | None = None


Text = TypeVar("Text", bound=SymbolText)


class SymbolRunner(ABC, Generic[Text]):
    """Implements `Runner`. on_failure: what a member's failure does to a text: "fail" | "continue" without it."""

    shares_pages = False

    def __init__(
        self,
        members: Sequence[Member],
        symbols: Symbols,
        policy: Policy,
        *,
        max_context: int,
        token_budget: int,
        max_sequences: int,
        on_failure: str,
    ) -> None:
        self.members = list(members)
        self.symbols = symbols
        self.policy = policy
        self.token_budget = token_budget
        self.on_failure = on_failure
        self.vocab_size = symbols.size
        self.max_context = max_context
        # Symbols take no memory: it is the members' pages that count.
        self.page_count = max_sequences * -(-max_context // PAGE)
        self.texts: dict[int, Text] = {}

    @abstractmethod
    def _new_text(self, sequence: int, told: Told) -> Text: ...

    @abstractmethod
    def _understand(self, text: Text) -> None:
        """Bring what follows from the text's symbols up to date, its prompt in every member's tokens first."""

    @abstractmethod
    def _rows(self, texts: Sequence[Text]) -> list[Rows]:
        """Per understood text its row [S], None while a member is not there yet, or what ended it."""

    def _changed(self, text: Text) -> None:
        """The text's symbols are other ones: what was computed for the old ones is void."""

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

    def copy_page(self, source: int, target: int) -> None:
        raise AssertionError("No page of an ensemble of several vocabularies is shared.")

    def release(self, sequence: int) -> None:
        self.texts.pop(sequence, None)
        for member in self.members:
            member.release(sequence)

    def _hear(self, span: Span) -> Text:
        """Note a span's symbols; a span that starts earlier than what is known takes the rest back."""
        text = self.texts.get(span.sequence)
        if text is None:
            told = span.options or Told([member.name for member in self.members], self.policy)
            text = self.texts[span.sequence] = self._new_text(span.sequence, told)
        if text.symbols[span.start :] != span.token_ids:  # asked again for the same: what is there may stay
            if span.start < text.begun:
                text.prompts = None
            text.symbols[span.start :] = span.token_ids
            self._changed(text)
        return text

    def _every_row(self, text: Text, span: Span) -> Tensor:
        """A row after each of the span's symbols, one by one."""
        whole, found = list(text.symbols), []
        for end in range(span.start + 1, span.end + 1):
            text.symbols = whole[:end]
            self._changed(text)
            if text.told.prompt_length is None or end <= text.told.prompt_length:
                text.prompts = None
            found.append(self._row_now(text))
        return torch.stack(found)

    def _row_now(self, text: Text) -> Tensor:
        """The text's row [S], however many passes it takes. Raises what ended it."""
        self._understand(text)
        row: Rows = None
        while row is None:
            (row,) = self._rows([text])
        if not isinstance(row, Tensor):
            raise row
        return row

    def _advance_member(self, member: Member, jobs: list[Job], budget: int) -> Sequence[Tensor | Exception | None]:
        """Bring a member up to date; whatever it raises is a failure of each of these texts."""
        try:
            return member.advance(jobs, budget)
        except Exception as error:
            log.warning("The member `%s` failed: %s", member.name, error)
            failure = EngineFailure(f"The member `{member.name}` failed: {type(error).__name__}: {error}.")
            return [failure] * len(jobs)

    def _failed(self, text: Text, m: int, error: GnomonError, failed: dict[int, GnomonError]) -> None:
        others = len(self.members) - len(text.told.dropped) - 1
        if self.on_failure == "continue" and others and isinstance(error, EngineFailure):
            text.told.dropped[m] = error.message
        else:
            failed[text.sequence] = error
