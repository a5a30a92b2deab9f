"""Options of a GRPO run, under the names that trl's GRPOConfig gives them; what trl has and we lack is refused."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class GRPOConfig(BaseModel):
    """One step samples `generation_batch` completions, `num_generations` for each prompt, and learns from them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_steps: int = Field(50, ge=1, description="Generation steps.")
    learning_rate: float = Field(1e-6, gt=0, description="Of AdamW, at its greatest.")
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = Field("linear", description="How it falls.")
    warmup_steps: int = Field(0, ge=0, description="Steps of a linear rise at the beginning.")
    per_device_train_batch_size: int = Field(8, ge=1, description="Completions of one forward and backward pass.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Such passes to one step of the optimiser.")
    num_generations: int = Field(8, ge=2, description="Completions of each prompt: the group.")
    num_iterations: int = Field(1, ge=1, description="Times that one batch of completions is learned from.")
    max_completion_length: int = Field(256, ge=1, description="Most tokens of a completion.")
    temperature: float = Field(1.0, gt=0, description="Of sampling, and of the policy that is trained.")
    top_p: float = Field(1.0, gt=0, le=1, description="Of sampling.")
    top_k: int = Field(0, ge=0, description="Of sampling; 0 keeps every token.")
    beta: float = Field(0.0, ge=0, description="Weight of the KL to the model as it was; above 0 a copy is kept.")
    epsilon: float = Field(0.2, gt=0, description="Ratios are clipped below 1 - epsilon.")
    epsilon_high: float | None = Field(None, gt=0, description="And above 1 + this; default: epsilon.")
    loss_type: Literal["grpo", "bnpo", "dapo", "dr_grpo"] = Field("dapo", description="What the loss is divided by.")
    scale_rewards: Literal["group", "batch", "none"] = Field("group", description="Whose spread divides advantages.")
    mask_truncated_completions: bool = Field(False, description="Leave completions out that hit the limit.")
    weight_decay: float = Field(0.0, ge=0, description="Of AdamW.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="Of AdamW.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="Of AdamW.")
    adam_epsilon: float = Field(1e-8, gt=0, description="Of AdamW.")
    max_grad_norm: float = Field(1.0, ge=0, description="Gradients are scaled down to this norm; 0 leaves them.")
    train_only: list[str] | None = Field(None, description="Train parameters whose name contains one of these.")
    sampler: Literal["engine", "transformers"] = Field(
        "engine", description="transformers: its generate and stock torch everywhere, for comparison."
    )
    seed: int = Field(42, ge=0, lt=2**32, description="Of sampling and of the order of prompts.")

    @property
    def generation_batch(self) -> int:
        return self.per_device_train_batch_size * self.gradient_accumulation_steps

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.generation_batch % self.num_generations:
            raise ValueError(
                f"per_device_train_batch_size x gradient_accumulation_steps is {self.generation_batch}: "
                f"it must be a multiple of num_generations ({self.num_generations})"
            )
        return self

    def rate(self, step: int) -> float:
        """The learning rate of step 0, 1, ..."""
        import math

        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.lr_scheduler_type == "constant":
            return self.learning_rate
        done = (step - self.warmup_steps) / max(1, self.max_steps - self.warmup_steps)
        left = 1 - done if self.lr_scheduler_type == "linear" else (1 + math.cos(math.pi * done)) / 2
        return self.learning_rate * left
