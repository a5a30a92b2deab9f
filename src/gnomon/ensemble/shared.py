"""SharedRunner: members of one vocabulary, fused row by row.

Their tokens and positions are the same, so one page table serves all: the prefix cache, speculation, chunks and
preemption of the engine work as with one model. This is the exact path: nothing is tokenised anew.
Legend: T tokens, R rows, C channels, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.arch.network import Network, copy_page
from gnomon.ensemble.fusion import fuse
from gnomon.ensemble.options import Policy
from gnomon.ensemble.told import Told, Votes
from gnomon.errors import UnsupportedModel
from gnomon.kernels.batch import RaggedBatch, Span


class SharedRunner:
    """Implements `Runner`. One page number means that page of every member."""

    shares_pages = True

    def __init__(
        self, networks: Sequence[Network], policy: Policy, *, page_count: int, max_context: int | None = None
    ) -> None:
        self.networks = list(networks)
        self.policy = policy
        self.vocab_size = min(network.vocab_size for network in networks)
        self.max_context = min([network.max_context for network in networks] + ([max_context] if max_context else []))
        self.page_count = page_count
        self.pages = [network.new_pages(page_count) for network in networks]

    def step(self, spans: list[Span]) -> list[Tensor]:
        batch = RaggedBatch.build(spans)
        hidden = [network.forward(batch, pages) for network, pages in zip(self.networks, self.pages, strict=True)]
        for span in spans:
            for counter in span.options.counters if span.options else ():
                counter.forwards += 1
                counter.tokens += len(span.token_ids)
        if not len(batch.wanted_rows_R):
            return [torch.empty(0, self.vocab_size) for _ in spans]
        logprobs = []
        for network, hidden_TC in zip(self.networks, hidden, strict=True):
            logits_RV = network.logits(hidden_TC[batch.wanted_rows_R])[:, : self.vocab_size]
            logprobs.append(torch.split(torch.log_softmax(logits_RV, dim=-1), batch.wanted_counts))
        return [self._fused(span, [rows[place] for rows in logprobs]) for place, span in enumerate(spans)]

    def hidden(self, spans: list[Span]) -> list[Tensor]:
        raise UnsupportedModel("An ensemble has no hidden states of its own.", hint="Embed with one of its members.")

    def copy_page(self, source: int, target: int) -> None:
        for pages in self.pages:
            copy_page(pages, source, target)

    def release(self, sequence: int) -> None:
        """Pages are the pool's business."""

    def _fused(self, span: Span, rows: list[Tensor]) -> Tensor:
        """[R, V] of every member as one."""
        told: Told | None = span.options
        policy = told.policy if told is not None else self.policy
        count = len(rows[0])
        fused = [
            fuse(
                [member[r] for member in rows],
                policy.weights,
                policy.fuse,
                alpha=policy.alpha,
                plausible=policy.plausible,
            )
            for r in range(count)
        ]
        if told is not None:
            told.steps += count
            told.fused_steps += count
            told.votes = {span.end - count + 1 + r: _votes([member[r] for member in rows]) for r in range(count)}
        return torch.stack(fused) if fused else torch.empty(0, self.vocab_size)


def _votes(rows: list[Tensor]) -> Votes:
    return lambda symbol: [float(row[symbol]) for row in rows]
