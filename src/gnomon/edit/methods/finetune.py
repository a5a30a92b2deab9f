"""Fine-tuning as editing: FT, FT-L and FT-M train one MLP's down projection on the fact and nothing else.

FT-M (cross-entropy over all target tokens, arXiv 2401.01286) is the honest baseline: simple, often as good at the
edited prompt as any method, and worse at leaving neighbours alone. FT reads the loss at the prompt's last token only;
FT-L also keeps every weight within a small distance (2012.00363). The change is kept at full rank unless `rank` says
otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.func import functional_call

from gnomon.edit.contexts import Context
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, MethodOptions, edit_method
from gnomon.errors import EditError
from gnomon.models.patch import Dense, LowRank


class FineTuneOptions(MethodOptions):
    """Options of the fine-tuning methods."""

    steps: Annotated[int, Field(gt=0, description="Most gradient steps.")] = 25
    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 5e-4
    stop: Annotated[float, Field(ge=0, description="Loss that is low enough.")] = 1e-2
    limit: Annotated[float | None, Field(gt=0, description="Most that any weight may move (L-infinity).")] = None
    chat: Annotated[bool, Field(description="See the fact through the chat template as well.")] = True
    prefixes: Annotated[int, Field(ge=0, le=16, description="Prefixes put before the prompt.")] = 0
    rank: Annotated[int | None, Field(gt=0, description="Keep only the change's largest directions.")] = None


class LimitedOptions(FineTuneOptions):
    """FT-L: every weight stays close."""

    limit: Annotated[float | None, Field(gt=0, description="Most that any weight may move (L-infinity).")] = 5e-3


@edit_method("ft", FineTuneOptions, paper="2202.05262")
def ft(editor: Editor, facts: Sequence[Fact], options: FineTuneOptions) -> Change:
    """Fine-tune one MLP, the loss read at the prompt's last token."""
    return _tune(editor, facts, options, "ft", "last")


@edit_method("ft-l", LimitedOptions, paper="2012.00363")
def ft_l(editor: Editor, facts: Sequence[Fact], options: LimitedOptions) -> Change:
    """Fine-tune one MLP, no weight moving far."""
    return _tune(editor, facts, options, "ft-l", "last")


@edit_method("ft-m", FineTuneOptions, paper="2401.01286")
def ft_m(editor: Editor, facts: Sequence[Fact], options: FineTuneOptions) -> Change:
    """Fine-tune one MLP on every target token: the honest baseline."""
    return _tune(editor, facts, options, "ft-m", "all")


def _tune(
    editor: Editor, facts: Sequence[Fact], options: FineTuneOptions, name: str, read: Literal["last", "all"]
) -> Change:
    layer = editor.layer(options.layers, name)
    down = editor.anatomy.downs[layer]
    start: Tensor = down.module.weight.detach()  # type: ignore[operator]
    weight = start.clone().requires_grad_(True)
    maker = editor.contexts(options.prefixes, chat=options.chat)
    contexts = [context for fact in facts for context in maker.of(fact)]
    search = torch.optim.Adam([weight], lr=options.rate)
    loss_before = loss_now = 0.0
    taken = 0
    for step in range(options.steps + 1):
        loss = likelihood(editor, {down.tensor: weight}, contexts, read)
        loss_now = float(loss.detach())
        loss_before = loss_now if step == 0 else loss_before
        if loss_now != loss_now:
            raise EditError("The training gave numbers that are not finite; nothing was changed.")
        if step == options.steps or loss_now < options.stop:
            break
        (weight.grad,) = torch.autograd.grad(loss, weight)
        search.step()
        taken += 1
        if options.limit is not None:
            with torch.no_grad():
                weight.copy_(start + (weight - start).clamp(-options.limit, options.limit))
    delta = (weight - start).detach().float()
    note = {
        "layer": layer,
        "steps": taken,
        "loss": [round(loss_before, 4), round(loss_now, 4)],
        "relative_norm": round(float(delta.norm() / start.norm()), 5),
    }
    kept: Any = Dense(delta)
    if options.rank is not None:
        left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
        size = options.rank
        kept = LowRank((left[:, :size] * values[:size]).float().contiguous(), right[:size].float().contiguous())
    return Change({down.tensor: kept}, [dict(note) for _ in facts])


def likelihood(
    editor: Editor, parameters: dict[str, Tensor], contexts: Sequence[Context], read: Literal["last", "all"] = "all"
) -> Tensor:
    """Mean -log p of the targets with some weights replaced; differentiable in them.

    read "last": every target token's probability at the prompt's last token, as ROME's FT reads it.
    """
    rows = Rows.align([c.inputs for c in contexts], [0] * len(contexts))
    base = editor.anatomy.base
    prefix = next(name for name, module in editor.anatomy.module.named_modules() if module is base)
    own = {name.removeprefix(f"{prefix}."): value for name, value in parameters.items()}
    arguments = {"input_ids": rows.ids_BT, "attention_mask": rows.mask_BT, "use_cache": False}
    hidden = functional_call(base, own, args=(), kwargs=arguments).last_hidden_state
    row = torch.tensor([b for b, c in enumerate(contexts) for _ in c.target])
    place = torch.tensor([(i if read == "all" else c.target[0]) - 1 for c in contexts for i in c.target])
    wanted = torch.tensor([t for c in contexts for t in c.target_ids])
    share = torch.tensor([1.0 / (len(c.target) * len(contexts)) for c in contexts for _ in c.target])
    logp = torch.log_softmax(editor.anatomy.logits(hidden[row, place]), -1).gather(1, wanted[:, None])[:, 0]
    return -(logp * share).sum()
