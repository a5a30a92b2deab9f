"""Logit bias as a LogitsStage: a number added to the logits of single tokens before masks and temperature.

-100 and below forbid a token, as OpenAI's clients expect; +100 all but forces it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gnomon.errors import UsageError
from gnomon.stages import StageContext

if TYPE_CHECKING:
    from torch import Tensor


class LogitBiasOptions(BaseModel):
    """Token id -> bias."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    logit_bias: Annotated[
        dict[int, float], Field(description='Token id to bias, -100..100, as JSON: {"42": -100}.')
    ] = {}

    @field_validator("logit_bias")
    @classmethod
    def _in_range(cls, value: dict[int, float]) -> dict[int, float]:
        for token, bias in value.items():
            if not -100 <= bias <= 100:
                raise ValueError(f"the bias of token {token} is {bias}, outside -100..100")
        return value


class LogitBiasStage:
    """Adds the biases; stateless after construction."""

    def __init__(self, bias: dict[int, float]) -> None:
        import torch

        self.ids = torch.tensor(list(bias), dtype=torch.int64)
        values = [float("-inf") if b <= -100 else b for b in bias.values()]
        self.values = torch.tensor(values, dtype=torch.float32)

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        logits_V[self.ids] += self.values
        return logits_V

    def accept(self, token_id: int) -> None:
        """Nothing to remember."""

    def rollback(self, count: int) -> None:
        """Nothing to forget."""

    def copy(self) -> LogitBiasStage:
        return self


def build(options: LogitBiasOptions, context: StageContext) -> LogitBiasStage | None:
    if not options.logit_bias:
        return None
    size = context.tokenizer.vocab_size
    for token in options.logit_bias:
        if not 0 <= token < size:
            raise UsageError(
                f"`logit_bias`: token id {token} is outside the vocabulary 0..{size - 1}.", param="logit_bias"
            )
    return LogitBiasStage(options.logit_bias)
