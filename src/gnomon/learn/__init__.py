"""Training loops whose trainer computes with the sampler's arithmetic: `GRPOTrainer` and its options.

    from gnomon.learn import GRPOConfig, GRPOTrainer
    result = GRPOTrainer("smollm2-135m-instruct", reward, prompts, GRPOConfig(max_steps=50)).train()

A result is a Patch, metrics per step, and the certainty that the KL between sampler and trainer was 0.
"""

from __future__ import annotations

from gnomon.learn.config import GRPOConfig
from gnomon.learn.grpo import GRPOTrainer, TrainResult
from gnomon.learn.policy import Policy
from gnomon.learn.rewards import open_reward, reward
from gnomon.learn.rollout import Rollout

__all__ = ["GRPOConfig", "GRPOTrainer", "Policy", "Rollout", "TrainResult", "open_reward", "reward"]
