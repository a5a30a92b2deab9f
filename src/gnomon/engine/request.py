"""What crosses the engine's door: a Request with its SamplingParams in; token events, decisions and the end out.

Token ids only: no text, no files, no models. Everything here is plain values and callables; the callables run on the
engine's thread and must not block.
Legend: V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from gnomon.errors import GnomonError, UsageError
from gnomon.kernels.side import SidePath

if TYPE_CHECKING:
    from torch import Tensor

MOST_LOGPROBS = 20
LEAST_TEMPERATURE = 1e-5
"""Below this a temperature only differs from 0 by rounding; it is refused rather than quietly taken as greedy."""

FinishReason = Literal["stop", "length", "cancelled", "content_filter", "error"]


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of one request are drawn. Raises UsageError naming the field that is out of range.

    temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 keep every token. max_tokens 0 only computes the prompt.
    logprobs, prompt_logprobs: how many alternatives to report (the token itself always); None reports nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: frozenset[int] = frozenset()
    ignore_eos: bool = False
    eos_token_ids: frozenset[int] = frozenset()
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        self._check(
            "temperature", self.temperature == 0 or self.temperature >= LEAST_TEMPERATURE, "0 (greedy) or above"
        )
        self._check("top_k", self.top_k >= 0, "0 (off) or above")
        self._check("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")
        self._check("min_p", 0 <= self.min_p <= 1, "between 0 and 1")
        self._check("repetition_penalty", self.repetition_penalty > 0, "above 0")
        self._check("frequency_penalty", -2 <= self.frequency_penalty <= 2, "between -2 and 2")
        self._check("presence_penalty", -2 <= self.presence_penalty <= 2, "between -2 and 2")
        self._check("seed", 0 <= self.seed < 2**64, "between 0 and 2**64 - 1")
        self._check("max_tokens", self.max_tokens >= 0, "0 or above")
        self._check(
            "min_tokens", 0 <= self.min_tokens <= self.max_tokens, f"between 0 and max_tokens {self.max_tokens}"
        )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            self._check(name, value is None or 0 <= value <= MOST_LOGPROBS, f"between 0 and {MOST_LOGPROBS}")

    def _check(self, name: str, holds: bool, wanted: str) -> None:
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            raise UsageError(f"`{name}` is {value}; it must be {wanted}.", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1 or self.frequency_penalty != 0 or self.presence_penalty != 0

    @property
    def ends(self) -> frozenset[int]:
        """Token ids that end the text."""
        return self.stop_token_ids if self.ignore_eos else self.stop_token_ids | self.eos_token_ids


@dataclass(frozen=True)
class TokenEvent:
    """One generated token. logprob and top are None and () unless asked for.

    ends: why generation ends after this token unless `on_token` answers otherwise ("stop": this is an end token, which
    is no part of the text; "length"), or None. checksum: CRC-32 over the bits of the first logits of the row it was
    drawn from, before anything touched them. trace: what the runner can say of this token (an ensemble: its votes).
    """

    request_id: str
    index: int
    token_id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    ends: Literal["stop", "length"] | None = None
    checksum: int = 0
    trace: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PromptLogprob:
    """One token of the prompt; logprob is None for the first, which nothing precedes."""

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Decision:
    """What `on_token` answers: CONTINUE, finish(reason), abort(error), or rollback(count)."""

    kind: Literal["continue", "finish", "abort", "rollback"]
    reason: FinishReason | None = None
    error: GnomonError | None = None
    count: int = 0

    CONTINUE: ClassVar[Decision]

    @classmethod
    def finish(cls, reason: Literal["stop", "length", "content_filter"] = "stop") -> Decision:
        """End normally, for this reason; nothing after this token is computed."""
        return cls("finish", reason=reason)

    @classmethod
    def abort(cls, reason: GnomonError | Literal["cancelled", "content_filter"] = "cancelled") -> Decision:
        """End without a result: an error, or as if the caller had cancelled."""
        if isinstance(reason, GnomonError):
            return cls("abort", reason="error", error=reason)
        return cls("abort", reason=reason)

    @classmethod
    def rollback(cls, count: int) -> Decision:
        """Take back the last `count` generated tokens, this one included, and go on from there.

        The positions are drawn with new noise, so that the same tokens do not come again by force; a greedy request
        needs a stage that forbids them.
        """
        return cls("rollback", count=count)


Decision.CONTINUE = Decision("continue")


@dataclass(frozen=True)
class Finished:
    """The end of one request: why, and what it used.

    completion_tokens counts the end token too. cached_tokens: prompt tokens whose keys and values were already there.
    details: what a runner adds to the usage, by capability.
    """

    reason: FinishReason
    error: GnomonError | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    details: Mapping[str, Any] = field(default_factory=dict)


class LogitsStage(Protocol):
    """Sees the logits of its request before sampling; one object per request and choice."""

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """Return the logits to use: may edit in place; a masked token is -inf."""

    def accept(self, token_id: int) -> None:
        """This token was sampled."""

    def rollback(self, count: int) -> None:
        """The last `count` accepted tokens were taken back."""

    def copy(self) -> LogitsStage:
        """An independent twin in the same state."""


def go_on(event: TokenEvent) -> Decision:
    """The plainest `on_token`: everything is welcome."""
    return Decision.CONTINUE


def ignore_end(finished: Finished) -> None:
    """The plainest `on_finish`."""


def always() -> bool:
    """The plainest `ready`."""
    return True


@dataclass
class Request:
    """One choice to generate.

    stream_index: which of n choices, part of the noise's key. priority: smaller is sooner. cache_salt: requests share
    computed prompt pages only with those of the same salt, and of the same patches. sides: patches that run beside
    the weights, in order; side_names: what they are, for the prefix cache. runner_options: handed to the runner with
    every span. on_prompt is called once, before the first token, when sampling.prompt_logprobs is set. on_finish is
    called exactly once, whatever happens. ready is asked before each step: while it says no, nothing of this request
    is computed and others go on; it must come to say yes without being told anything.
    """

    id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    stream_index: int = 0
    fuse: Sequence[LogitsStage] = ()
    bias: Sequence[LogitsStage] = ()
    mask: Sequence[LogitsStage] = ()
    on_token: Callable[[TokenEvent], Decision] = go_on
    on_prompt: Callable[[list[PromptLogprob]], None] | None = None
    on_finish: Callable[[Finished], None] = ignore_end
    ready: Callable[[], bool] = always
    priority: int = 0
    cache_salt: str = field(default="", repr=False)
    sides: tuple[SidePath, ...] = field(default=(), repr=False)
    side_names: tuple[str, ...] = ()
    runner_options: Any = None

    @property
    def page_salt(self) -> str:
        """What, besides its tokens, a page of this request depends on."""
        return "\0".join((self.cache_salt, *self.side_names))
