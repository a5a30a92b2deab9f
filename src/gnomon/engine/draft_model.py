"""Drafts by a smaller model, or by the same weights in fewer bits.

It reads what its sequence has, then guesses on: each guess is drawn with the noise that the sequence itself will use,
so that at any temperature two models of one mind draw the same tokens. What it gives are guesses only: the engine
confirms them with its own logits and draws, so its rounding, its pages and even its absence cannot show in the output.
"""

from __future__ import annotations

from torch import Tensor

from gnomon.arch.network import Network
from gnomon.engine.drafting import Choose
from gnomon.engine.pages import PagePool
from gnomon.engine.runner import PagedRunner
from gnomon.kernels.batch import PAGE, Span

CATCH_UP = 64
"""Tokens that are read in one step before guessing starts: a long prompt delays nobody's second token much."""
SEQUENCES = 4
"""Sequences of full length for which there are pages."""


class DraftModel:
    """One network and its pages, shared by the drafters of an engine. All run on the engine's thread."""

    def __init__(self, network: Network, max_context: int) -> None:
        self.context = min(network.max_context, max_context)
        self.runner = PagedRunner(network, page_count=SEQUENCES * -(-self.context // PAGE))
        self.pool = PagePool(self.runner.page_count, "")
        self._made = 0

    def drafter(self) -> ModelDrafter:
        self._made += 1
        return ModelDrafter(self, self._made)


class ModelDrafter:
    """Implements `Drafter` for one sequence. Read: the tokens whose keys and values lie in its pages."""

    def __init__(self, model: DraftModel, number: int) -> None:
        self.model = model
        self.number = number
        self._read: list[int] = []
        self._pages: list[int] = []

    def propose(self, tokens: list[int], most: int, choose: Choose) -> list[int]:
        self._rewind(tokens)
        if not self._reserve(min(len(tokens) + most, self.model.context)):
            return []
        behind = len(tokens) - len(self._read)
        if behind > CATCH_UP:
            self._feed(tokens[len(self._read) : len(self._read) + CATCH_UP], wants="none")
            return []
        guesses: list[int] = []
        following = tokens[len(self._read) :]
        while len(guesses) < most and len(tokens) + len(guesses) < self.model.context:
            logits_V = self._feed(following, wants="last")[-1]
            guesses.append(choose(logits_V, len(guesses)))
            following = guesses[-1:]
        return guesses

    def close(self) -> None:
        """The sequence is over: its pages are free."""
        self.model.pool.release(self._pages)
        self._pages, self._read = [], []

    def _rewind(self, tokens: list[int]) -> None:
        """Keep what was read as far as it is still the text, and at least one token to read."""
        same = 0
        for same, (old, new) in enumerate(zip(self._read, tokens, strict=False), start=1):
            if old != new:
                same -= 1
                break
        del self._read[min(same, len(tokens) - 1) :]

    def _reserve(self, length: int) -> bool:
        while len(self._pages) * PAGE < length:
            page = self.model.pool.allocate()
            if page is None:
                return False
            self._pages.append(page)
        return True

    def _feed(self, token_ids: list[int], wants: str) -> Tensor:
        span = Span(self.number, list(token_ids), len(self._read), self._pages, wants)
        self._read += token_ids
        return self.model.runner.step([span])[0]
