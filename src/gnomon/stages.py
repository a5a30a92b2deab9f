"""The protocols by which a room acts on one request: on its prompt, its logits, its tokens, its text.

A stage is built once for each request and choice. Knows nothing of options and registers nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.engine.request import TokenEvent
    from gnomon.generation import Outcome
    from gnomon.models.tokenizer import Tokenizer


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


@dataclass(frozen=True)
class Ruling:
    """What a TokenGate says of the latest token.

    rollback: take back so many tokens, the latest included. hold: so many of the latest tokens may still be taken back,
    and give no text yet. finish: end here, for this reason.
    """

    rollback: int = 0
    hold: int = 0
    finish: Literal["stop", "length"] | None = None


@runtime_checkable
class TokenGate(Protocol):
    """A logits stage that also judges what was drawn, before any of it becomes text.

    One with an attribute `shown` (a set of token ids) makes these control tokens part of the text.
    """

    def judge(self, event: TokenEvent) -> Ruling:
        """The stage has accepted this token already."""

    def note(self) -> Mapping[str, Any]:
        """What is worth knowing of the latest token, by capability, for those who ask for log-probabilities."""

    def outcome(self, text: str, tokens: int, *, cut: bool) -> Outcome:
        """The text as it left, with so many tokens; cut: something else ended it, perhaps in the middle."""


@dataclass(frozen=True)
class Released:
    """What a StreamStage lets out.

    settled: how many more characters of its input are decided (let out, replaced or dropped); None: len(text).
    cut: where, in all the text it was given so far, everything ends; None: it goes on.
    hidden: spans of all the text it was given that were replaced: their tokens are reported nowhere.
    held: how many characters it has and lets nobody see yet, where that may be told.
    back_to: an end of a token, told by `token_ends_at`: the tokens after it are taken back, and others drawn instead.
    """

    text: str = ""
    settled: int | None = None
    cut: int | None = None
    reason: Literal["stop", "content_filter"] = "stop"
    findings: tuple[Mapping[str, Any], ...] = ()
    hidden: tuple[tuple[int, int], ...] = ()
    held: int | None = None
    back_to: int | None = None


class PromptStage(Protocol):
    """Sees a prompt's texts before they become tokens; may change them, or raise Blocked.

    One with an attribute `roles` (a set of roles) sees only the messages of these.
    """

    def check(self, text: str) -> str:
        """One text: a raw prompt, or what one message says."""


class StreamStage(Protocol):
    """Sees canonical text in order; releases, holds, replaces or ends it. Depends on the text, never on the split.

    It must not block. One with an attribute `waits` that is true may wait in `finish`, which is then called on a thread
    of its own, and has a property `behind`: while that is true no further token is computed for this text. One with an
    attribute `goes_back` that is true stands last, is told where tokens end (`token_ends_at(place)`, before their text)
    and begins anew with the text that stays (`go_back(text)`).
    """

    def push(self, text: str) -> Released:
        """More text arrived."""

    def finish(self) -> Released:
        """No more text comes: let out or drop what is held."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use. open_model: a function that opens another model the operator named.

    memory: what the stages of one prompt share. `private_prompt` there keeps the prompt out of the ledger.
    host: the Model whose prompt it is. filtered: whether top_k, top_p or min_p leave tokens out.
    """

    tokenizer: Tokenizer
    model: str
    seed: int
    open_model: Callable[[str], Any]
    memory: dict[str, Any] = field(default_factory=dict)
    host: Any = None
    max_tokens: int = 0
    temperature: float = 0.0
    filtered: bool = False


@dataclass
class Stages:
    """The stages of one request, in acting order."""

    fuse: list[LogitsStage] = field(default_factory=list)
    bias: list[LogitsStage] = field(default_factory=list)
    mask: list[LogitsStage] = field(default_factory=list)
    stream: list[StreamStage] = field(default_factory=list)
