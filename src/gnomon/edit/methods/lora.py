"""LoRA as editing: a low-rank change of several MLPs, trained on the fact (arXiv 2106.09685)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.methods.finetune import likelihood
from gnomon.edit.registry import Change, MethodOptions, edit_method
from gnomon.errors import EditError
from gnomon.models.patch import LowRank


class LoraOptions(MethodOptions):
    """LoRA's options."""

    rank: Annotated[int, Field(gt=0, le=256, description="Rank of each tensor's change.")] = 8
    alpha: Annotated[float, Field(gt=0, description="The change is scaled by alpha / rank.")] = 16.0
    steps: Annotated[int, Field(gt=0, description="Most gradient steps.")] = 30
    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 5e-3
    stop: Annotated[float, Field(ge=0, description="Loss that is low enough.")] = 1e-2
    chat: Annotated[bool, Field(description="See the fact through the chat template as well.")] = True
    prefixes: Annotated[int, Field(ge=0, le=16, description="Prefixes put before the prompt.")] = 0


@edit_method("lora", LoraOptions, paper="2106.09685")
def lora(editor: Editor, facts: Sequence[Fact], options: LoraOptions) -> Change:
    """Train a low-rank change of the profile's MLPs on the facts."""
    layers = editor.layers(options.layers, "memit")
    generator = torch.Generator().manual_seed(editor.seed)
    weights: dict[str, Tensor] = {editor.tensor(i): editor.anatomy.downs[i].module.weight for i in layers}  # type: ignore[misc]
    downs = {
        n: torch.randn(options.rank, w.shape[1], generator=generator) / w.shape[1] ** 0.5 for n, w in weights.items()
    }
    ups = {n: torch.zeros(w.shape[0], options.rank) for n, w in weights.items()}
    learned = [part.requires_grad_(True) for part in (*downs.values(), *ups.values())]
    scale = options.alpha / options.rank
    maker = editor.contexts(options.prefixes, chat=options.chat)
    contexts = [context for fact in facts for context in maker.of(fact)]
    search = torch.optim.Adam(learned, lr=options.rate)
    losses: list[float] = []
    for step in range(options.steps + 1):
        changed = {name: weight + scale * ups[name] @ downs[name] for name, weight in weights.items()}
        loss = likelihood(editor, changed, contexts)
        losses.append(float(loss.detach()))
        if losses[-1] != losses[-1]:
            raise EditError("The training gave numbers that are not finite; nothing was changed.")
        if step == options.steps or losses[-1] < options.stop:
            break
        for part, gradient in zip(learned, torch.autograd.grad(loss, learned), strict=True):
            part.grad = gradient
        search.step()
    deltas = {name: LowRank((scale * ups[name]).detach(), downs[name].detach()) for name in weights}
    note = {"steps": len(losses) - 1, "loss": [round(losses[0], 4), round(losses[-1], 4)]}
    return Change(deltas, [dict(note) for _ in facts])
