"""The sampler that everybody else has: transformers' own generate, one padded batch, stock torch.

For comparison: its log-probabilities are not the trainer's, and learning from them is off-policy by the difference.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gnomon.learn.config import GRPOConfig
from gnomon.learn.policy import Policy
from gnomon.learn.rollout import Rollout, seed_of


@torch.no_grad()
def stock_rollouts(policy: Policy, prompts: Sequence[list[int]], config: GRPOConfig, step: int) -> list[Rollout]:
    """`num_generations` completions of every prompt, left-padded into one batch."""
    ends = sorted(policy.model.tokenizer.eos_token_ids)
    texts = [prompt for prompt in prompts for _ in range(config.num_generations)]
    width, pad = max(map(len, texts)), ends[0] if ends else 0
    ids = torch.tensor([[pad] * (width - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts])
    torch.manual_seed(seed_of(config.seed, step, 0) % 2**63)
    with policy.arithmetic():
        out = policy.module.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=True,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            max_new_tokens=config.max_completion_length,
            eos_token_id=ends or None,
            pad_token_id=pad,
            output_logits=True,
            return_dict_in_generate=True,
        )
    logprobs = torch.log_softmax(torch.stack(out.logits, 1).double(), -1)
    drawn = out.sequences[:, width:]
    results = []
    for text, tokens, rows in zip(texts, drawn.tolist(), logprobs, strict=True):
        length = next((place + 1 for place, token in enumerate(tokens) if token in ends), len(tokens))
        own = rows[torch.arange(length), torch.tensor(tokens[:length])]
        results.append(Rollout(text, tokens[:length], own.tolist(), tokens[length - 1] in ends))
    return results
