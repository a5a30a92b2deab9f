"""GRPO's two formulas: advantages of a group, and the clipped loss (DeepSeekMath, arXiv 2402.03300, eq. 3).

Variants of the divisor: DAPO (arXiv 2503.14476), Dr. GRPO (arXiv 2503.20783). Pure functions of tensors.
Legend: N completions, G of a group, T tokens of all completions one after another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.learn.config import GRPOConfig

SPREAD = 1e-4
"""Added to a standard deviation before it divides, as trl does."""


def advantages(rewards_N: Tensor, config: GRPOConfig) -> Tensor:
    """Reward less its group's mean, over the spread that `scale_rewards` names -> [N] float64."""
    rewards_NG = rewards_N.double().reshape(-1, config.num_generations)
    centred = rewards_NG - rewards_NG.mean(1, keepdim=True)
    if config.scale_rewards == "group":
        centred = centred / (rewards_NG.std(1, keepdim=True) + SPREAD)
    elif config.scale_rewards == "batch":
        centred = centred / (rewards_NG.std() + SPREAD)
    return centred.reshape(-1)


def policy_loss(
    logprobs_T: Tensor,
    old_T: Tensor,
    reference_T: Tensor | None,
    advantages_T: Tensor,
    weights_T: Tensor,
    config: GRPOConfig,
) -> Tensor:
    """Sum over tokens of weight x (clipped surrogate + beta x KL). weights_T: see `token_weights`."""
    ratio_T = torch.exp(logprobs_T - old_T)
    high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    clipped_T = torch.clamp(ratio_T, 1 - config.epsilon, 1 + high)
    losses_T = -torch.minimum(ratio_T * advantages_T, clipped_T * advantages_T)
    if reference_T is not None:
        away_T = reference_T - logprobs_T
        losses_T = losses_T + config.beta * (torch.exp(away_T) - away_T - 1)
    return (losses_T * weights_T).sum()


def token_weights(lengths: list[int], counted: list[bool], config: GRPOConfig) -> Tensor:
    """What each token's loss is multiplied by, so that the sum is the loss of the whole batch -> [T] float64."""
    kept = [length if keep else 0 for length, keep in zip(lengths, counted, strict=True)]
    total = max(1, sum(kept))
    each: list[float] = []
    for length, own in zip(lengths, kept, strict=True):
        if config.loss_type == "grpo":
            weight = 1 / (len(lengths) * max(1, own))
        elif config.loss_type == "dr_grpo":
            weight = 1 / (len(lengths) * config.max_completion_length)
        else:  # dapo, bnpo: one process holds the whole batch, where the two are the same
            weight = 1 / total
        each += [weight if own else 0.0] * length
    return torch.tensor(each, dtype=torch.float64)


def kl(sampler_T: Tensor, trainer_T: Tensor) -> float:
    """Estimate of KL(sampler || trainer) from the sampler's tokens, never negative (Schulman's k3)."""
    away = trainer_T - sampler_T
    return float((torch.exp(away) - away - 1).mean())
