"""ROME: rank-one model editing (arXiv 2202.05262), with R-ROME's consistent keys (2403.07175).

One layer. For each fact: keys k (the MLP's inner activations at the subject's last token, one per context), a value
(searched by gradient), and the rank-one change that maps k to it and disturbs ordinary text least (eq. 2). Two things
are more than the paper's: every context's key is met, not only their mean (`several_keys`), and the keys of other
subjects in the same sentence are kept as they are (`contrast`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contrast import contrast_keys
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.registry import Change, SearchOptions, edit_method
from gnomon.edit.search import Found, find_value
from gnomon.edit.solve import Factor, Factors, detector, rank_one


class RomeOptions(SearchOptions):
    """ROME's options."""

    strength: Annotated[float, Field(gt=0, description="The found change of value is multiplied by this.")] = 1.0
    consistent_keys: Annotated[bool, Field(description="R-ROME: one averaged key throughout; false: as in ROME.")] = (
        True
    )
    several_keys: Annotated[bool, Field(description="Meet every context's key, not only their mean.")] = True
    damping: Annotated[float, Field(ge=0, description="Softens meeting several keys.")] = 15.0
    contrast: Annotated[
        float, Field(ge=0, description="How much other subjects in the same sentence count as ordinary text.")
    ] = 1.0


@edit_method("rome", RomeOptions, paper="2202.05262, 2403.07175")
def rome(editor: Editor, facts: Sequence[Fact], options: RomeOptions) -> Change:
    """Rank-one change of one MLP per fact, one after another."""
    layer = editor.layer(options.layers, "rome")
    factor = editor.factor(layer, options.ridge)
    pending: dict[int, Factors] = {}
    notes: list[dict[str, Any]] = []
    for fact in facts:
        with editor.wearing(pending):
            found = find_value(editor, fact, layer, options)
            avoided_MN = contrast_keys(editor, fact, layer) if options.contrast else None
        change = update(factor, found, options, avoided_MN)
        notes.append(note(editor, layer, found, change))
        pending[layer] = _stacked(pending.get(layer), change)
    return Change({editor.tensor(layer): editor.low_rank(layer, pending[layer])}, notes)


def update(factor: Factor, found: Found, options: RomeOptions, avoided_MN: Tensor | None) -> Factors:
    """One fact's change from its keys and its value."""
    residual_C = options.strength * found.value.delta_C
    if not options.several_keys or not options.consistent_keys:
        bare = None if options.consistent_keys else found.keys_BM[0]
        return rank_one(factor, found.keys_BM.mean(0), residual_C, bare)
    direction = detector(factor, found.keys_BM.T, options.damping, avoided_MN, options.contrast)
    return residual_C.double()[:, None], direction[None]


def note(editor: Editor, layer: int, found: Found, change: Factors) -> dict[str, Any]:
    """What the report says of one fact's change."""
    weight = editor.anatomy.downs[layer].weight_CM
    return {
        "layer": layer,
        "steps": found.value.steps,
        "loss": [round(found.value.loss_before, 4), round(found.value.loss, 4)],
        "relative_norm": round(float(change[0].norm() * change[1].norm()) / float(weight.norm()), 5),
    }


def _stacked(before: Factors | None, change: Factors) -> Factors:
    if before is None:
        return change
    return torch.cat([before[0], change[0]], 1), torch.cat([before[1], change[1]], 0)
