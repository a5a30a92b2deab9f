"""The runner: spans of tokens in, rows of logits out. PagedRunner drives a Network over its pages.

Other runners (several models behind one virtual vocabulary, recurrent networks) stand behind the same protocol.
Legend: R rows, V vocabulary, T tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from gnomon.arch.network import Network, copy_page
from gnomon.errors import GnomonError
from gnomon.kernels.batch import RaggedBatch, Span

Rows = Tensor | GnomonError | None


class Runner(Protocol):
    """What the engine needs of a model."""

    vocab_size: int
    max_context: int
    page_count: int
    shares_pages: bool
    """Whether a page computed for one sequence may serve another: the prefix cache needs it."""

    def step(self, spans: list[Span]) -> Sequence[Rows]:
        """Compute the spans; per span the logits [R, V] of the rows it wants.

        None for a span that wants its last row: not ready yet, ask for that token again. An error ends that span's
        request alone; ContextLengthExceeded while generating is an ordinary end, by length.
        """

    def hidden(self, spans: list[Span]) -> list[Tensor]:
        """Compute the spans; per span the final hidden states [T, C]."""

    def release(self, sequence: int) -> None:
        """This sequence is over, or starts again from the beginning."""

    def copy_page(self, source: int, target: int) -> None:
        """Make page `target` hold what `source` holds. Called only where pages are shared."""


class PagedRunner:
    """One network and its key-value pages."""

    def __init__(self, network: Network, *, page_count: int, max_context: int | None = None) -> None:
        self.network = network
        self.vocab_size = network.vocab_size
        self.max_context = max_context or network.max_context
        self.page_count = page_count
        self.shares_pages: bool = getattr(network, "shares_pages", True)
        self.accepts_drafts: bool = getattr(network, "accepts_drafts", self.shares_pages)
        self.pages = network.new_pages(page_count)

    def step(self, spans: list[Span]) -> list[Tensor]:
        batch = RaggedBatch.build(spans)
        hidden_TC = self.network.forward(batch, self.pages)
        if not len(batch.wanted_rows_R):
            return [hidden_TC.new_empty(0, self.vocab_size) for _ in spans]
        logits_RV = self.network.logits(hidden_TC[batch.wanted_rows_R], batch.wanted_side_rows)
        return list(torch.split(logits_RV, batch.wanted_counts))

    def hidden(self, spans: list[Span]) -> list[Tensor]:
        batch = RaggedBatch.build(spans)
        hidden_TC = self.network.forward(batch, self.pages).cpu()
        return list(torch.split(hidden_TC, [len(span.token_ids) for span in spans]))

    def copy_page(self, source: int, target: int) -> None:
        copy_page(self.pages, source, target)

    def release(self, sequence: int) -> None:
        """Pages are the pool's business; a network with caches of its own is told."""
        if (release := getattr(self.network, "release", None)) is not None:
            release(sequence)
