"""One model as sampler and trainer: the engine's weights, and a module that trains them on the same arithmetic.

fp32: the module's parameters are the engine's tensors. bf16: the module keeps float32 masters, which its forward rounds
as the engine's are; `sync` rounds them into the engine. Legend: R rows, T tokens of all completions one after another.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from gnomon.arch.module import hf_module
from gnomon.engine.gradients import token_logprobs
from gnomon.errors import UnsupportedModel, UsageError
from gnomon.kernels import canonical
from gnomon.learn.rollout import Rollout
from gnomon.model import Model
from gnomon.models.identity import tensor_digest
from gnomon.models.patch import Dense, Patch


class Policy:
    """Wraps a loaded model; nothing else may change its weights meanwhile."""

    def __init__(self, model: Model, train_only: Sequence[str] | None = None, *, stock: bool = False) -> None:
        if model.network is None or model.profile is None:
            raise UnsupportedModel(f"`{model.name}` is an embedding model: it cannot be trained to generate.")
        if model.profile.dtype not in ("fp32", "bf16"):
            raise UsageError(
                f"The profile `{model.profile.dtype}` packs its weights: they cannot be trained.",
                hint="Load with profile='fp32' or 'bf16'.",
                param="profile",
            )
        if model.profile.beside:
            raise UsageError(
                "The patches of this model run beside its weights: training would not see them.",
                hint="Train the unpatched model, or load the patched weights (Patch.apply).",
            )
        self.model = model
        self.network = model.network
        self.dtype = model.profile.dtype
        self.kernel = model.profile.kernel
        self.stock = stock
        self.module: Any = hf_module(self.network, model.checkpoint)
        if self.dtype == "bf16":
            self._make_masters()
        self.trained = self._choose(train_only)

    def _make_masters(self) -> None:
        for name, parameter in self.module.named_parameters():
            parameter.data = self.model.checkpoint[name].to(torch.float32, copy=True)

    def _choose(self, parts: Sequence[str] | None) -> dict[str, Tensor]:
        chosen = {}
        for name, parameter in self.module.named_parameters():
            parameter.requires_grad_(parts is None or any(part in name for part in parts))
            if parameter.requires_grad:
                chosen[name] = parameter
        if not chosen:
            raise UsageError(f"No parameter's name contains {' or '.join(parts or [])}.", param="train_only")
        return chosen

    def logprobs(
        self, rollouts: Sequence[Rollout], temperature: float = 1.0, module: Any = None
    ) -> tuple[Tensor, Tensor]:
        """(at this temperature, with a gradient; at temperature 1, without) of every completion token -> [T] each.

        The texts stand packed in one row; every token has the bits that the engine's ragged batch gives it.
        """
        ids = [token for rollout in rollouts for token in rollout.ids]
        places = [place for rollout in rollouts for place in range(len(rollout.ids))]
        rows: list[int] = []
        targets: list[int] = []
        start = 0
        for rollout in rollouts:
            first = start + len(rollout.prompt_ids) - 1  # the row that predicts the first completion token
            rows += range(first, first + len(rollout.token_ids))
            targets += rollout.token_ids
            start += len(rollout.ids)
        with self.arithmetic():
            logits_RV = (module or self.module)(
                input_ids=torch.tensor([ids]),
                position_ids=torch.tensor([places]),
                use_cache=False,
                logits_to_keep=torch.tensor(rows),
            ).logits[0]
        target_R = torch.tensor(targets)
        tempered = token_logprobs(logits_RV if temperature == 1 else logits_RV / temperature, target_R)
        if temperature == 1:
            return tempered, tempered.detach()
        return tempered, token_logprobs(logits_RV.detach(), target_R)

    def arithmetic(self) -> AbstractContextManager[None]:
        """What the module computes with: the engine's operators, or stock torch (bf16: under autocast)."""
        if self.stock:
            return torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == "bf16")
        return canonical(self.dtype, kernel=self.kernel)

    @contextmanager
    def updating(self) -> Iterator[None]:
        """The engine rests while parameters change; then it computes with the new ones, under a new fingerprint."""
        with self.model.worker.paused():
            yield
            self.sync()

    @torch.no_grad()
    def sync(self) -> None:
        """Bring the engine up to the module's parameters. Inside `updating` only."""
        live = self.network.tensors()
        if self.dtype == "bf16":
            for name, master in self.trained.items():
                live[name].copy_(master.to(torch.bfloat16))
        self.network.refresh()
        self.model.weights_changed({name: tensor_digest(live[name]) for name in self.trained})

    def patch(self, metadata: dict[str, Any]) -> Patch:
        """What training added to the checkpoint: dense deltas, with the greatest error that adding them back makes."""
        deltas, worst = {}, 0.0
        for name, parameter in self.trained.items():
            before, after = self.model.checkpoint[name], parameter.detach()
            delta = after - before.float()
            if bool(delta.any()):
                kept = (before.float() + delta).to(before.dtype).float()
                worst = max(worst, float((kept - after).abs().max()))
                deltas[name] = Dense(delta)
        if not deltas:
            raise UsageError("Training changed no weight: every reward was the same.", hint="Try another reward.")
        return Patch(deltas, self.model.checkpoint.identity, metadata, {"max_abs_rounding": worst})

    def weights_digest(self) -> str:
        """sha256 over the trained parameters' bytes: equal runs end in equal ones."""
        from hashlib import sha256

        lines = sorted(f"{name} {tensor_digest(parameter)}" for name, parameter in self.trained.items())
        return sha256("\n".join(lines).encode()).hexdigest()
