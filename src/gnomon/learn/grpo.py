"""GRPO with its own rollout: sample a group for each prompt, reward, step; the sampler is the trainer, to the bit.

`kl_sampler_trainer` and `max_abs_logprob_gap` are logged at every step and are 0 exactly on the engine's own sampler; a
run is a function of (weights, profile, prompts, rewards, options).
"""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gnomon.engine.request import SamplingParams
from gnomon.errors import PromptError, UsageError
from gnomon.learn.config import GRPOConfig
from gnomon.learn.loss import advantages, kl, policy_loss, token_weights
from gnomon.learn.policy import Policy
from gnomon.learn.rewards import Reward
from gnomon.learn.rollout import Rollout, rollouts, seed_of
from gnomon.model import Model
from gnomon.models.patch import Patch
from gnomon.progress import progress

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Step:
    """What one step saw. reward_std: mean of the groups' spreads. completion_length: mean, in tokens."""

    step: int
    reward: float
    reward_std: float
    loss: float
    grad_norm: float
    learning_rate: float
    kl_sampler_trainer: float
    max_abs_logprob_gap: float
    completion_length: float
    fingerprint: str


@dataclass(frozen=True)
class TrainResult:
    """weights_digest: sha256 of the trained parameters. patch: what training added."""

    steps: list[Step]
    patch: Patch
    weights_digest: str
    fingerprint: str


class GRPOTrainer:
    """Trains a loaded model in place (close it, or take the patch off, to be rid of the change).

    reward_funcs: one or several, their numbers are added. train_dataset: prompts (text, or messages for the chat
    template), or rows with a `prompt` and columns that the rewards see.
    """

    def __init__(
        self,
        model: Model,
        reward_funcs: Reward | Sequence[Reward],
        train_dataset: Sequence[str | Row],
        args: GRPOConfig | None = None,
    ) -> None:
        self.model = model
        self.rewards = [reward_funcs] if callable(reward_funcs) else list(reward_funcs)
        self.config = args or GRPOConfig()
        self.rows: list[Row] = [{"prompt": row} if isinstance(row, str) else row for row in train_dataset]
        if not self.rows or not self.rewards:
            raise UsageError("GRPO needs at least one prompt and one reward.")
        self.prompts = [self._encode(place, row) for place, row in enumerate(self.rows)]
        self.policy = Policy(model, self.config.train_only, stock=self.config.sampler == "transformers")
        self.reference: Any = copy.deepcopy(self.policy.module).requires_grad_(False) if self.config.beta else None
        c = self.config
        self.optimizer = torch.optim.AdamW(
            list(self.policy.trained.values()),
            lr=c.learning_rate,
            betas=(c.adam_beta1, c.adam_beta2),
            eps=c.adam_epsilon,
            weight_decay=c.weight_decay,
            foreach=False,
        )

    def train(self, on_step: Callable[[Step], None] | None = None) -> TrainResult:
        """Run all steps. on_step is told of each as it ends."""
        steps = []
        with progress("Training", self.config.max_steps) as bar:
            for number in range(self.config.max_steps):
                steps.append(self._step(number))
                bar.advance()
                if on_step is not None:
                    on_step(steps[-1])
        metadata = {"method": "grpo", "options": self.config.model_dump(), "made_on": self.model.name}
        return TrainResult(
            steps=steps,
            patch=self.policy.patch(metadata),
            weights_digest=self.policy.weights_digest(),
            fingerprint=self.model.fingerprint,
        )

    # -- one step -----------------------------------------------------------------------------------------------

    def _step(self, number: int) -> Step:
        c = self.config
        chosen = self._choose(number)
        fingerprint = self.model.fingerprint
        batch = self._sample(chosen, number)
        rewards_N = self._reward(chosen, batch)
        advantages_N = advantages(rewards_N, c)
        lengths = [len(rollout.token_ids) for rollout in batch]
        counted = [rollout.finished or not c.mask_truncated_completions for rollout in batch]
        weights = torch.split(token_weights(lengths, counted, c), lengths)
        size = c.per_device_train_batch_size
        pieces = [range(first, min(first + size, len(batch))) for first in range(0, len(batch), size)]
        old: list[Tensor] = []
        gap, distance, losses, norm = 0.0, 0.0, [], 0.0
        for iteration in range(c.num_iterations):
            self.optimizer.zero_grad()
            loss_sum = 0.0
            for place, piece in enumerate(pieces):
                some = [batch[i] for i in piece]
                logprobs_T, raw_T = self.policy.logprobs(some, c.temperature)
                if iteration == 0:
                    old.append(logprobs_T.detach())
                    sampler_T = torch.tensor([v for rollout in some for v in rollout.logprobs], dtype=torch.float64)
                    gap = max(gap, float((raw_T - sampler_T).abs().max()))
                    distance += kl(sampler_T, raw_T) * len(sampler_T) / sum(lengths)
                advantages_T = torch.cat([advantages_N[i].expand(lengths[i]) for i in piece])
                weights_T = torch.cat([weights[i] for i in piece])
                reference_T = self._reference(some)
                loss = policy_loss(logprobs_T, old[place], reference_T, advantages_T, weights_T, c)
                loss.backward()  # type: ignore[no-untyped-call]
                loss_sum += float(loss.detach())
            norm = self._update(number)
            losses.append(loss_sum)
        groups = rewards_N.reshape(-1, c.num_generations)
        return Step(
            step=number + 1,
            reward=float(rewards_N.mean()),
            reward_std=float(groups.std(1).mean()),
            loss=losses[0],
            grad_norm=norm,
            learning_rate=c.rate(number),
            kl_sampler_trainer=distance,
            max_abs_logprob_gap=gap,
            completion_length=sum(lengths) / len(lengths),
            fingerprint=fingerprint,
        )

    def _update(self, number: int) -> float:
        c = self.config
        parameters = list(self.policy.trained.values())
        limit = c.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, limit, foreach=False))
        if norm != norm or norm == float("inf"):
            raise UsageError(f"The gradient of step {number + 1} is not a number.", hint="Lower learning_rate.")
        for group in self.optimizer.param_groups:
            group["lr"] = c.rate(number)
        with self.policy.updating():
            self.optimizer.step()
        return norm

    def _reference(self, some: Sequence[Rollout]) -> Tensor | None:
        if self.reference is None:
            return None
        with torch.no_grad():
            return self.policy.logprobs(some, self.config.temperature, self.reference)[0]

    # -- sampling and rewards -----------------------------------------------------------------------------------

    def _choose(self, number: int) -> list[int]:
        """The rows of a step: every epoch in an order of its own."""
        wanted = self.config.generation_batch // self.config.num_generations
        chosen: list[int] = []
        for place in range(number * wanted, (number + 1) * wanted):
            epoch, index = divmod(place, len(self.rows))
            order = list(range(len(self.rows)))
            random.Random(f"{self.config.seed}/{epoch}").shuffle(order)
            chosen.append(order[index])
        return chosen

    def _sample(self, chosen: Sequence[int], number: int) -> list[Rollout]:
        c = self.config
        prompts = [self.prompts[row] for row in chosen]
        if c.sampler == "transformers":
            from gnomon.learn.stock import stock_rollouts

            return stock_rollouts(self.policy, prompts, c, number)
        params = [
            SamplingParams(
                temperature=c.temperature,
                top_p=c.top_p,
                top_k=c.top_k,
                seed=seed_of(c.seed, number, place),
                max_tokens=c.max_completion_length,
                eos_token_ids=self.model.tokenizer.eos_token_ids,
                logprobs=0,
            )
            for place in range(len(prompts))
        ]
        return rollouts(self.model.worker, prompts, c.num_generations, params)

    def _reward(self, chosen: Sequence[int], batch: Sequence[Rollout]) -> Tensor:
        rows = [self.rows[row] for row in chosen for _ in range(self.config.num_generations)]
        ends = self.model.tokenizer.eos_token_ids
        texts = [
            self.model.tokenizer.decode([token for token in rollout.token_ids if token not in ends])
            for rollout in batch
        ]
        completions = [
            text if isinstance(row["prompt"], str) else [{"role": "assistant", "content": text}]
            for row, text in zip(rows, texts, strict=True)
        ]
        columns = {name: [row.get(name) for row in rows] for name in self.rows[0] if name != "prompt"}
        total = torch.zeros(len(batch), dtype=torch.float64)
        for function in self.rewards:
            found = function(
                prompts=[row["prompt"] for row in rows],
                completions=completions,
                completion_ids=[rollout.token_ids for rollout in batch],
                **columns,
            )
            if len(found) != len(batch):
                name = getattr(function, "__name__", "a reward")
                raise UsageError(f"`{name}` gave {len(found)} rewards for {len(batch)} completions.", param="reward")
            total += torch.tensor([float(value) for value in found], dtype=torch.float64)
        return total

    def _encode(self, place: int, row: Row) -> list[int]:
        prompt = row.get("prompt")
        if isinstance(prompt, str):
            return self.model.encode(prompt)
        if isinstance(prompt, Sequence) and prompt:
            return self.model.render(prompt)
        raise PromptError(f"Row {place + 1} has no `prompt` that is a text or messages.", param="prompt")


def read_prompts(path: Path) -> list[Row]:
    """Rows of a JSON-lines file, each with a `prompt`; or plain lines of a .txt file."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"Cannot read the prompts in {path}: {error}.", param="prompts") from None
    if path.suffix == ".txt":
        return [{"prompt": line} for line in lines if line.strip()]
    rows: list[Row] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}, line {number}: not valid JSON: {error}.", param="prompts") from None
        if not isinstance(row, dict) or "prompt" not in row:
            raise UsageError(f"{path}, line {number}: no `prompt`.", param="prompts")
        rows.append(row)
    return rows


def as_json(step: Step) -> str:
    return json.dumps(asdict(step))
