"""The sampling options: names and ranges as OpenAI, vLLM and transformers spell them.

Defaults are greedy: the same prompt gives the same text unless a temperature is asked for.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_LOGPROBS = 20
MOST_CHOICES = 128


class SamplingOptions(BaseModel):
    """How tokens are drawn. Order of a step: penalties, bias, masks, temperature, top_k, top_p, min_p, Gumbel draw."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    temperature: Annotated[float, Field(ge=0, le=2, description="0 is greedy: the most likely token, always.")] = 0.0
    top_k: Annotated[int, Field(ge=-1, description="Keep the k most likely tokens; 0 or -1 keeps all.")] = 0
    top_p: Annotated[float, Field(gt=0, le=1, description="Keep the smallest set of tokens with this mass.")] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1, description="Keep tokens at least this likely, relative to the top.")] = (
        0.0
    )
    repetition_penalty: Annotated[
        float, Field(gt=0, le=10, description="Divide (or multiply, below zero) logits of tokens already seen.")
    ] = 1.0
    frequency_penalty: Annotated[float, Field(ge=-2, le=2, description="Subtract this per earlier use.")] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2, le=2, description="Subtract this once when used before.")] = 0.0
    seed: Annotated[
        int | None, Field(ge=-(2**63), lt=2**64, description="Same seed, same tokens. Made and reported when absent.")
    ] = None
    max_tokens: Annotated[int | None, Field(ge=1, description="Most tokens to generate; default: see the docs.")] = None
    min_tokens: Annotated[int, Field(ge=0, description="No end of text before this many tokens.")] = 0
    stop_token_ids: Annotated[list[int], Field(description="Token ids that end the text.")] = []
    ignore_eos: Annotated[bool, Field(description="Go on after the model's own end-of-text token.")] = False
    logprobs: Annotated[
        int | None,
        Field(ge=0, le=MOST_LOGPROBS, description="Report each token's logprob, and this many alternatives."),
    ] = None
    echo: Annotated[bool, Field(description="Put the prompt in front of the text (and its logprobs, when asked).")] = (
        False
    )
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES, description="How many texts to draw for the prompt.")] = 1

    @model_validator(mode="after")
    def _limits_agree(self) -> SamplingOptions:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} is above max_tokens {self.max_tokens}")
        return self
