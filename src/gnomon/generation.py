"""What a generation gives back: plain frozen values that cross the facade's door. No torch, no engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

FinishReason = Literal["stop", "length", "content_filter", "cancelled"]


@dataclass(frozen=True)
class TokenLogprob:
    """One token with its log-probability (before penalties, bias, masks and temperature) and the best alternatives.

    text: the token for display; bytes: its exact bytes; logprob is None for the first token of a prompt.
    trace: what the runner says of it, by capability (an ensemble: its members' votes).
    """

    token_id: int
    text: str
    bytes: bytes
    logprob: float | None
    top: tuple[TokenLogprob, ...] = ()
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens in and out. cached_tokens: how many prompt tokens came from the prefix cache.

    details: what a runner adds, by capability (an ensemble: its members' forward passes).
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Trace:
    """Per token of the text: what a constraint left of the model's own distribution, and what it did.

    kept_mass: probability that the model gave to the tokens allowed here. kinds: "forced" (one token was allowed),
    "masked" (the model's favourite was not), "free" (it was), "closed" (written to end the text in time).
    """

    kept_mass: list[float] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    rollbacks: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a constraint says of a finished text. completed: the text is whole; parsed: its value, when it is."""

    parsed: Any = None
    completed: bool = False
    trace: Trace | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """One finished text. id: the same in the response and the ledger; seed: as given, or as made."""

    id: str
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None
    finish_reason: FinishReason
    seed: int
    fingerprint: str
    usage: Usage
    index: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None
    findings: tuple[Mapping[str, Any], ...] = ()
    outcome: Outcome | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def parsed(self) -> Any:
        """The text as a value, when a grammar constrained it and it is complete; otherwise None."""
        return self.outcome.parsed if self.outcome else None

    @property
    def completed(self) -> bool:
        """Whether the text is whole: by its grammar's word, or because it ended by itself."""
        return self.outcome.completed if self.outcome else self.finish_reason == "stop"

    @property
    def trace(self) -> Trace | None:
        """What a grammar did at each token."""
        return self.outcome.trace if self.outcome else None


@dataclass(frozen=True)
class Chunk:
    """A piece of one streamed choice. The last one of a choice has finish_reason and usage.

    held: how many characters after this piece the guard holds now, where it tells that (`show_held`) and it changed.
    """

    id: str
    index: int
    text: str
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    seed: int = 0
    fingerprint: str = ""
    findings: tuple[Mapping[str, Any], ...] = ()
    outcome: Outcome | None = None
    held: int | None = None


@dataclass(frozen=True)
class Score:
    """How likely a continuation is: logprob is the sum over its tokens (natural logarithm)."""

    logprob: float
    tokens: list[TokenLogprob]

    @property
    def perplexity(self) -> float:
        import math

        return math.exp(-self.logprob / len(self.tokens))


@dataclass(frozen=True)
class Run:
    """One finished choice, with all that is needed to make it again and to compare it bit for bit.

    created: seconds since 1970. token_ids: every token drawn, an end token included. options: plain values, the seed
    apart; not replayable when some were not plain. digest: sha256 over each token and the checksum of its logits.
    """

    id: str
    choice: int
    created: float
    model: str
    reference: str
    fingerprint: str
    profile: str
    prompt_ids: list[int]
    options: Mapping[str, Any]
    replayable: bool
    seed: int
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str = ""
    digest: str = ""
