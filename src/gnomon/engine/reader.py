"""A text that grows, read by the network: hidden states of new tokens only, on key-value pages that stay.

Token ids in, hidden states out. Runs on the engine's thread (`EngineWorker.run_exclusive`); pages are taken as they are
needed and given back by `close`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnomon.errors import ContextLengthExceeded, OutOfMemory
from gnomon.kernels.batch import PAGE, Span

if TYPE_CHECKING:
    from gnomon.engine.engine import Engine


class Reader:
    """length: tokens read so far."""

    def __init__(self, engine: Engine, number: int) -> None:
        self.engine = engine
        self.number = number
        self.length = 0
        self.pages: list[int] = []

    @torch.inference_mode()
    def read(self, token_ids: list[int], *, after: int | None = None) -> Tensor:
        """The next tokens' final hidden states [T, C]. after: forget all but so many tokens before.

        Raises ContextLengthExceeded and OutOfMemory, with nothing read.
        """
        self.length = self.length if after is None else min(after, self.length)
        end = self.length + len(token_ids)
        if end > self.engine.runner.max_context:
            raise ContextLengthExceeded(
                f"The text has {end} tokens; the context holds {self.engine.runner.max_context}.", param="input"
            )
        while len(self.pages) * PAGE < end:
            page = self.engine.pool.allocate()
            if page is None:
                raise OutOfMemory(f"No page of keys and values is free for a text of {end} tokens.")
            self.pages.append(page)
        rows: list[Tensor] = []
        budget = self.engine.scheduler.token_budget
        for at in range(0, len(token_ids), budget):
            chunk = token_ids[at : at + budget]
            rows += self.engine.runner.hidden([Span(self.number, chunk, self.length, self.pages, "none")])
            self.length += len(chunk)
        return torch.cat(rows) if rows else torch.empty(0, 0)

    def close(self) -> None:
        """Give the pages back. Idempotent."""
        self.engine.pool.release(self.pages)
        self.engine.runner.release(self.number)
        self.pages, self.length = [], 0
