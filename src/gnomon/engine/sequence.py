"""A Sequence: one request on its way through the engine. Tokens, how many of them are computed, and where they lie."""

from __future__ import annotations

from dataclasses import dataclass, field

from gnomon.engine.drafting import AdaptiveLength, Drafter
from gnomon.engine.request import PromptLogprob, Request
from gnomon.engine.sampler import RequestSampler
from gnomon.kernels.batch import PAGE, Span


@dataclass(eq=False)
class Sequence:
    """number: unique in the engine, and its order of arrival. keys: names of the prompt's full pages.

    drafts: tokens after the known ones, for the coming step only; guessed: they are guesses, not forced by a stage.
    paused: its request was not ready when last asked; it keeps its pages and is not scheduled.
    """

    number: int
    request: Request
    sampler: RequestSampler
    keys: list[bytes]
    tokens: list[int] = field(init=False)
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    cached_tokens: int = 0
    prompt_logprobs: list[PromptLogprob] = field(default_factory=list)
    cancelled: bool = False
    paused: bool = False
    drafter: Drafter | None = None
    draft_length: AdaptiveLength = field(default_factory=AdaptiveLength)
    drafts: list[int] = field(default_factory=list)
    guessed: bool = True

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)

    @property
    def pending(self) -> int:
        """Tokens to compute before the next one can be drawn."""
        return len(self.tokens) - self.computed

    @property
    def order(self) -> tuple[int, int]:
        """First come, first served within a priority."""
        return self.request.priority, self.number

    @property
    def reads_cache(self) -> bool:
        """A prompt whose own log-probabilities are asked for must be computed whole."""
        return self.request.sampling.prompt_logprobs is None

    @property
    def full_pages(self) -> int:
        return self.computed // PAGE

    def span(self, count: int) -> Span:
        """The next `count` tokens as work for the runner; those past the known ones are drafts."""
        end = self.computed + count
        if end > len(self.tokens):
            known = self.tokens[self.computed :]
            guessed = self.drafts[: count - len(known)]
            return self._span(known + guessed, "all")
        if not self.reads_cache and self.computed < len(self.request.prompt_ids):
            wants = "all"
        else:
            wants = "last" if end == len(self.tokens) else "none"
        return self._span(self.tokens[self.computed : end], wants)

    def _span(self, ids: list[int], wants: str) -> Span:
        request = self.request
        return Span(self.number, ids, self.computed, self.pages, wants, request.sides, request.runner_options)
