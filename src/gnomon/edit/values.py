"""Values: what the edited matrix must give at the subject so that the model says the target.

Gradient search for a vector delta added at (layer, subject token): the target becomes likely in every context, what
the subject is stays (a KL term), and the vector stays short (ROME, arXiv 2202.05262, eq. 4). Only the tokens from the
subject on run through the layers from the edited one on. Knows nothing of the update that follows.
Legend: B contexts, S active tokens, C hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gnomon.edit.contexts import Context
from gnomon.edit.passes import Captured, Passes, Rows
from gnomon.errors import EditError


@dataclass(frozen=True)
class ValueOptions:
    """How the search goes. rate: Adam's, in units of the unedited vector's RMS (relative) or as it is, as in the paper.

    clamp: |delta| at most this times the unedited vector. stop: mean -log p that is enough.
    """

    steps: int = 25
    rate: float = 0.5
    relative: bool = True
    clamp: float = 4.0
    kl: float = 0.0625
    decay: float = 1e-3
    stop: float = 0.05
    most_probable: bool = False


@dataclass(frozen=True)
class Value:
    """What was found. delta_C, and the mean -log p of the target before and after; steps: how many were taken."""

    delta_C: Tensor
    captured: Captured
    loss_before: float
    loss: float
    steps: int
    probabilities: list[float] = field(default_factory=list)


def capture(passes: Passes, layer: int, contexts: Sequence[Context], essence: Context | None) -> Captured:
    """One forward over all contexts (the essence last), for the search and for the keys."""
    rows = [*contexts, essence] if essence is not None else list(contexts)
    return passes.capture(Rows.align([c.inputs for c in rows], [c.subject for c in rows]), layer)


def optimise(
    passes: Passes,
    captured: Captured,
    contexts: Sequence[Context],
    options: ValueOptions,
    *,
    essence: bool,
    at_layer: bool = False,
) -> Value:
    """Search for delta. essence: the last captured row is the KL prompt. at_layer: delta acts on the layer's output.

    Raises EditError when the loss is not finite.
    """
    row_of = torch.tensor([b for b, c in enumerate(contexts) for _ in c.target])
    place_of = torch.tensor([i - 1 - c.subject for c in contexts for i in c.target])
    wanted = torch.tensor([t for c in contexts for t in c.target_ids])
    share = torch.tensor([1.0 / (len(c.target) * len(contexts)) for c in contexts for _ in c.target])
    start = captured.layer_BC if at_layer else captured.output_BC
    size = start[0].norm()
    calm = torch.log_softmax(passes.anatomy.logits(captured.hidden_BSC[-1, 0]), -1) if essence else None

    delta = torch.zeros_like(start[0], requires_grad=True)
    unit = float(size) / len(delta) ** 0.5 if options.relative else 1.0
    search = torch.optim.Adam([delta], lr=options.rate * unit)
    before = nll = 0.0
    taken = 0
    for step in range(options.steps + 1):
        hidden = passes.above(captured, lambda out: out + delta, at_layer=at_layer)
        logits = passes.anatomy.logits(hidden[row_of, place_of])
        logp = torch.log_softmax(logits, -1)
        loss_target = -(logp.gather(1, wanted[:, None])[:, 0] * share).sum()
        loss = loss_target + options.decay * delta.norm() / size**2
        if calm is not None:
            now = torch.log_softmax(passes.anatomy.logits(hidden[-1, 0]), -1)
            loss = loss + options.kl * (calm.exp() * (calm - now)).sum()
        nll = float(loss_target.detach())
        before = nll if step == 0 else before
        if nll != nll:
            raise EditError("The search for the value gave numbers that are not finite; nothing was changed.")
        reached = options.most_probable and bool((logits.argmax(-1) == wanted).all())
        if step == options.steps or float(loss.detach()) < options.stop or reached:
            break
        (delta.grad,) = torch.autograd.grad(loss, delta)
        search.step()
        taken += 1
        with torch.no_grad():
            longest = options.clamp * size
            if delta.norm() > longest:
                delta.mul_(longest / delta.norm())
    picked = logp.detach().gather(1, wanted[:, None])[:, 0]
    each = [float(picked[row_of == b].mean().exp()) for b in range(len(contexts))]
    return Value(delta.detach(), captured, before, nll, taken, each)
