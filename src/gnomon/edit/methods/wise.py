"""WISE: a side memory of one MLP, and a route to it by how differently it answers (arXiv 2405.14768).

The side memory is W + dW. dW moves by gradient on the facts; its answers must differ from W's by much on edited places
and by little elsewhere (the margin loss), and a token goes to it where they differ by more than the threshold.
Gradients of dW lie in the span of the edited places' keys K; ours is held in that of C^-1 K, where C is the second
moment of other places' keys, which answers least to those (as ROME's u does). Ours too: each token is routed for
itself. Of the paper's shards and merges there is one patch per edit, each with its own route, as in WISE-Retrieve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contexts import PREFIXES
from gnomon.edit.contrast import other_facts
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.solve import Factor
from gnomon.edit.training import TrainingOptions, positions, train
from gnomon.errors import EditError
from gnomon.kernels.wrappers import make_wrapper
from gnomon.models.patch import Wrapper

DEPTH = 2 / 3
"""Where the side memory lies, as a share of the depth (the paper takes a late layer)."""
OTHERS = 12
RIDGE = 0.01


class WiseOptions(TrainingOptions):
    """WISE's options. Differences are counted in lengths of the unedited answer."""

    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 0.1
    steps: Annotated[int, Field(gt=0, description="Most gradient steps.")] = 120
    alpha: Annotated[float, Field(ge=0, description="Most difference elsewhere.")] = 0.1
    beta: Annotated[float, Field(ge=0, description="Least difference on edited places.")] = 0.5
    gamma: Annotated[float, Field(ge=0, description="Least margin between the two.")] = 0.4
    route: Annotated[
        float, Field(gt=0, lt=1, description="The threshold lies at this share between elsewhere and edited places.")
    ] = 0.3


@edit_method("wise", WiseOptions, paper="2405.14768", experimental=True, on="activations")
def wise(editor: Editor, facts: Sequence[Fact], options: WiseOptions) -> Change:
    """A side memory that answers for one MLP where it has learned to answer differently."""
    deep = round(DEPTH * len(editor.anatomy.layers))
    layer = editor.layer(options.layers if options.layers is not None else [deep], "wise")
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    contexts = [context for fact in facts for context in maker.of(fact)]
    rows = Rows.align([c.inputs for c in contexts], [0] * len(contexts))
    row, token = (torch.tensor(axis) for axis in zip(*positions(contexts), strict=True))
    keys_nM = editor.passes.keys(rows, [layer])[layer][row, token].float()
    others = [editor.model.encode(text) for text in PREFIXES]
    others += [list(c.inputs) for fact in facts for other in other_facts(fact, OTHERS) for c in maker.of(other)]
    other_rows = Rows.align(others, [0] * len(others))
    elsewhere_NM = editor.passes.keys(other_rows, [layer])[layer][other_rows.mask_BT.bool()].float()
    with torch.no_grad():
        size = float((keys_nM @ editor.anatomy.downs[layer].weight_CM.float().T).norm(dim=1).mean())
    down = _span(Factor.of(elsewhere_NM.T @ elsewhere_NM / len(elsewhere_NM), RIDGE).solve(keys_nM.T).T)
    up = torch.zeros(editor.anatomy.hidden, len(down), requires_grad=True)
    inside_nr, outside_Nr = keys_nM @ down.T, elsewhere_NM @ down.T

    def margins() -> Tensor:
        """max(0, a_out - alpha) + max(0, beta - a_in) + max(0, gamma - (a_in - a_out)); the worst ones count."""
        within: Tensor = _length(inside_nr @ up.T) / size
        without = _length(outside_Nr @ up.T).topk(min(16, len(outside_Nr))).values / size
        loss: Tensor = (
            torch.relu(without - options.alpha).mean()
            + torch.relu(options.beta - within).mean()
            + torch.relu(options.gamma - (within.min() - without.max()))
        )
        return loss

    def apart() -> bool:
        """Whether a threshold lies between edited places and all others, with half the margin to spare."""
        with torch.no_grad():
            between = _length(inside_nr @ up.T).min() - _length(outside_Nr @ up.T).max()
        return float(between) > options.gamma * size / 2

    everywhere = {
        "up": up,
        "down": down,
        "threshold": torch.zeros(1),
    }  # while it is trained every place is routed to it
    found = train(
        editor, layer, contexts, lambda: make_wrapper("routed", everywhere), [up], options, extra=margins, settled=apart
    )
    with torch.no_grad():
        least, most = float(_length(inside_nr @ up.T).min()), float(_length(outside_Nr @ up.T).max())
    if least <= most:
        raise EditError(
            "WISE found no threshold: the side memory differs as much elsewhere as on the edited places.",
            hint="Try another --layer, more `steps`, or fewer facts at once.",
        )
    threshold = most + options.route * (least - most)
    note = {**found.note(layer), "threshold": round(threshold, 4), "differs": [round(most, 4), round(least, 4)]}
    tensors = {"up": up.detach(), "down": down, "threshold": torch.tensor([threshold])}
    return Change({}, [dict(note) for _ in facts], wrappers=[Wrapper("routed", layer, tensors)])


def _span(keys_nM: Tensor) -> Tensor:
    """An orthonormal basis of the keys' span [r, M]; directions with almost nothing in them are left out."""
    _, values, basis_rM = torch.linalg.svd(keys_nM.double(), full_matrices=False)
    kept: Tensor = basis_rM[values > 1e-3 * values[0]].float().contiguous()
    return kept


def _length(rows: Tensor) -> Tensor:
    """Euclidean norm of each row, with a gradient at zero."""
    return torch.sqrt(rows.pow(2).sum(1) + 1e-12)
