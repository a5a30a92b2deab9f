"""Training a wrapper on facts: only its own tensors move, and only from the wrapped layer upwards is anything computed.

In go contexts, a way to make the wrapper from its tensors, and the tensors; they are changed in place. Knows no method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.passes import Rows
from gnomon.edit.registry import MethodOptions
from gnomon.errors import EditError

if TYPE_CHECKING:
    from gnomon.edit.contexts import Context
    from gnomon.edit.editor import Editor
    from gnomon.kernels.wrappers import Wrapping


class TrainingOptions(MethodOptions):
    """Options of every method that trains a wrapper."""

    steps: Annotated[int, Field(gt=0, description="Most gradient steps.")] = 60
    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 0.05
    stop: Annotated[float, Field(ge=0, description="Mean -log p of the target that is low enough.")] = 0.05
    chat: Annotated[bool, Field(description="See the fact through the chat template as well.")] = True
    prefixes: Annotated[int, Field(ge=0, le=16, description="Prefixes put before the prompt.")] = 0
    frames: Annotated[int, Field(ge=0, le=8, description="Loose sentences about the subject seen as well.")] = 0


@dataclass(frozen=True)
class Trained:
    """Mean -log p of the targets before and after, and the steps taken."""

    loss_before: float
    loss: float
    steps: int

    def note(self, layer: int) -> dict[str, object]:
        """What a report says of it."""
        return {"layer": layer, "steps": self.steps, "loss": [round(self.loss_before, 4), round(self.loss, 4)]}


def train(
    editor: Editor,
    layer: int,
    contexts: Sequence[Context],
    make: Callable[[], Wrapping],
    learned: Sequence[Tensor],
    options: TrainingOptions,
    *,
    extra: Callable[[], Tensor] | None = None,
    settled: Callable[[], bool] | None = None,
) -> Trained:
    """Adam on -log p of the targets plus `extra`. learned: leaves that require gradients. settled: what else must be
    so before the training may stop early.

    Raises EditError when the loss is not finite.
    """
    rows = Rows.align([c.inputs for c in contexts], [0] * len(contexts))
    row = torch.tensor([b for b, c in enumerate(contexts) for _ in c.target])
    place = torch.tensor([i - 1 for c in contexts for i in c.target])
    wanted = torch.tensor([t for c in contexts for t in c.target_ids])
    share = torch.tensor([1.0 / (len(c.target) * len(contexts)) for c in contexts for _ in c.target])
    captured = editor.passes.capture(rows, layer)
    search = torch.optim.Adam(learned, lr=options.rate)
    before = now = 0.0
    taken = 0
    with editor.wrapped(layer, make):
        for step in range(options.steps + 1):
            hidden = editor.passes.above(captured, lambda out: out)
            logp = torch.log_softmax(editor.anatomy.logits(hidden[row, place]), -1).gather(1, wanted[:, None])[:, 0]
            loss = -(logp * share).sum()
            now = float(loss.detach())
            before = now if step == 0 else before
            if now != now:
                raise EditError("The training gave numbers that are not finite; nothing was changed.")
            if step == options.steps or (now < options.stop and (settled is None or settled())):
                break
            total = loss if extra is None else loss + extra()
            for part, gradient in zip(learned, torch.autograd.grad(total, learned), strict=True):
                part.grad = gradient
            search.step()
            taken += 1
    return Trained(before, now, taken)


def positions(contexts: Sequence[Context]) -> list[tuple[int, int]]:
    """(context, token) of every place that predicts a token of a target, in order."""
    return [(b, i - 1) for b, c in enumerate(contexts) for i in c.target]
