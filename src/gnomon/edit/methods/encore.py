"""ENCORE: MEMIT that stops its search as soon as the target is the most probable (arXiv 2502.01636).

Early stopping and a weight on the change's norm keep single edits small, so that long sequences of them leave the model
intact.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contrast import Avoided
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.methods.memit import MemitOptions, as_change, spread
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.solve import Factor, Factors, least_squares


class EncoreOptions(MemitOptions):
    """ENCORE's options."""

    norm_weight: Annotated[float, Field(ge=0, description="Weight of a small change, in mean eigenvalues of C.")] = 1.0


@edit_method("encore", EncoreOptions, paper="2502.01636")
def encore(editor: Editor, facts: Sequence[Fact], options: EncoreOptions) -> Change:
    """MEMIT with most-probable early stopping and a norm constraint; for long sequences of edits."""
    layers = editor.layers(options.layers, "encore")
    avoided = Avoided(editor, facts, options.contrast)

    def solve(layer: int, keys_MB: Tensor, residuals_CB: Tensor) -> Factors:
        moment = avoided.moment(layer)
        size = moment.shape[0]
        share = options.norm_weight * torch.trace(moment) / size
        factor = Factor.of(moment + share * torch.eye(size, dtype=torch.float64), options.ridge)
        return least_squares(factor, keys_MB, residuals_CB, options.weight)

    return as_change(editor, *spread(editor, facts, layers, options, solve, early=True))
