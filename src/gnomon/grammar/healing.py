"""Token healing: a prompt that ends in the middle of what the model would write as one token.

"http:" ends with the token ":", after which the model has hardly ever seen "//" begin a token: it knows "://". So the
last tokens that could be the beginning of a longer one are taken off the prompt, and what is generated must begin with
their text, however spelt; that beginning is not reported again. Never across a control token, nor inside a character.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, model_validator

from gnomon.capability import Capability
from gnomon.errors import UsageError
from gnomon.grammar.selecting import Spelling, spelling_of
from gnomon.stages import StageContext

if TYPE_CHECKING:
    from torch import Tensor

MOST_TOKENS = 10
"""Tokens that are taken back at most."""
HEAL = Capability(
    name="heal",
    help="Let the model spell the prompt's end anew, as part of a longer token.",
    options="gnomon.grammar.healing:HealOptions",
    phase="mask",
    logits_stage="gnomon.grammar.healing:build",
    prompt_ids="gnomon.grammar.healing:trim",
    parse="gnomon.grammar.healing:parse",
    conflicts=(
        ("grammar", "a grammar begins where the prompt ends, and a healed token lies on both sides of that place."),
        ("ensemble", "its members spell a prompt each in tokens of their own."),
    ),
)


class HealOptions(BaseModel):
    """`heal: true`."""

    model_config = ConfigDict(extra="forbid")

    on: bool = True

    @model_validator(mode="before")
    @classmethod
    def _shorthand(cls, value: Any) -> Any:
        return {"on": value} if isinstance(value, bool) else value


def parse(text: str) -> bool:
    """`--heal on`, `--heal off`."""
    if text not in ("on", "off", "true", "false"):
        raise UsageError(f"--heal {text}: it is `on` or `off`.", param="heal")
    return text in ("on", "true")


def trim(options: HealOptions, ids: list[int], context: StageContext) -> list[int]:
    """The prompt without the tokens that may be spelt anew; their bytes are left in the context for the stage."""
    if not options.on:
        return ids
    tokenizer = context.tokenizer
    spelling, control = spelling_of(tokenizer), tokenizer.special_ids | tokenizer.eos_token_ids
    taken, text = 0, b""
    for count in range(1, min(MOST_TOKENS, len(ids) - 1) + 1):
        token = ids[-count]
        if token in control or not (spelled := tokenizer.token_bytes(token)):
            break
        text = spelled + text
        if not spelling.beyond(text):
            break
        if _whole(text):
            taken, context.memory["healed"] = count, text
    return ids[: len(ids) - taken]


def _whole(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Healing:
    """Until the taken-back text stands again, only tokens that agree with it."""

    def __init__(self, spelling: Spelling, left: bytes) -> None:
        self.spelling = spelling
        self.left = left
        self.before: list[bytes] = []

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        if not self.left:
            return logits_V
        agreeing = [token for token, _ in self.spelling.beginnings(self.left)] + self.spelling.beyond(self.left)
        kept = logits_V[agreeing].clone()
        logits_V.fill_(float("-inf"))
        logits_V[agreeing] = kept
        return logits_V

    def accept(self, token_id: int) -> None:
        self.before.append(self.left)
        self.left = self.left[len(self.spelling.bytes_of(token_id)) :] if self.left else b""

    def rollback(self, count: int) -> None:
        self.left = self.before[-count]
        del self.before[-count:]

    def copy(self) -> Healing:
        twin = Healing(self.spelling, self.left)
        twin.before = list(self.before)
        return twin


def build(options: HealOptions, context: StageContext) -> Healing | None:
    healed: bytes = context.memory.get("healed", b"")
    return Healing(spelling_of(context.tokenizer), healed) if options.on and healed else None
