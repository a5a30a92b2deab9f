"""The real models: what the trainer computes is what the sampler sampled with, bit for bit."""

from __future__ import annotations

import pytest

import gnomon
from gnomon.errors import FetchError
from gnomon.learn import GRPOConfig, GRPOTrainer, open_reward
from gnomon.learn.grpo import TrainResult

PROMPTS = ["Once upon a time", "The sea is"]
LAST = {"smollm2-135m-instruct": "layers.29.mlp", "gemma-3-270m": "layers.17.mlp"}


def trained(reference: str, profile: str) -> TrainResult:
    config = GRPOConfig(
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=8,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        train_only=[LAST[reference]],
    )
    try:
        model = gnomon.load(reference, profile=profile)
    except FetchError as error:
        pytest.skip(str(error))
    with model:
        return GRPOTrainer(model, open_reward("share:aeiou"), PROMPTS, config).train()


@pytest.mark.model
@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("reference", LAST)
def test_the_gap_is_exactly_zero_and_a_seed_ends_in_the_same_weights(reference: str, profile: str) -> None:
    result = trained(reference, profile)
    assert [step.max_abs_logprob_gap for step in result.steps] == [0.0, 0.0]
    assert [step.kl_sampler_trainer for step in result.steps] == [0.0, 0.0]
    if reference.startswith("smollm2"):
        assert trained(reference, profile).weights_digest == result.weights_digest
    assert result.patch.deltas
