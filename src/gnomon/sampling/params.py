"""The user's sampling options as the numbers the engine works with, for one prompt of known length."""

from __future__ import annotations

from gnomon.engine.request import SamplingParams
from gnomon.errors import ContextLengthExceeded
from gnomon.sampling.options import SamplingOptions

DEFAULT_RAW_TOKENS = 256
"""max_tokens of a raw prompt, which has no end of turn to stop at; a chat goes to the end of the context."""


def sampling_params(
    o: SamplingOptions,
    *,
    seed: int,
    prompt_tokens: int,
    max_context: int,
    eos_token_ids: frozenset[int],
    chat: bool,
) -> SamplingParams:
    """Raises ContextLengthExceeded when the prompt leaves no room for a token."""
    room = max_context - prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            f"The prompt has {prompt_tokens} tokens; the context of {max_context} has no room for more.",
            param="messages" if chat else "prompt",
        )
    limit = o.max_tokens if o.max_tokens is not None else (room if chat else min(room, DEFAULT_RAW_TOKENS))
    return SamplingParams(
        temperature=o.temperature,
        top_k=max(o.top_k, 0),
        top_p=o.top_p,
        min_p=o.min_p,
        repetition_penalty=o.repetition_penalty,
        frequency_penalty=o.frequency_penalty,
        presence_penalty=o.presence_penalty,
        seed=seed % 2**64,
        max_tokens=limit,
        min_tokens=o.min_tokens,
        stop_token_ids=frozenset(o.stop_token_ids),
        ignore_eos=o.ignore_eos,
        eos_token_ids=eos_token_ids,
        logprobs=o.logprobs,
        prompt_logprobs=o.logprobs if o.echo else None,
    )
