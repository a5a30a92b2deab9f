"""EMMET: ROME's equality constraint for a whole batch, at one layer (arXiv 2403.14236)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.methods.rome import note
from gnomon.edit.registry import Change, SearchOptions, edit_method
from gnomon.edit.search import find_value
from gnomon.edit.solve import equality


class EmmetOptions(SearchOptions):
    """EMMET's options."""

    damping: Annotated[float, Field(ge=0, description="Softens the equality constraints.")] = 1e-3


@edit_method("emmet", EmmetOptions, paper="2403.14236")
def emmet(editor: Editor, facts: Sequence[Fact], options: EmmetOptions) -> Change:
    """A batch of facts at one layer, all of whose keys map exactly to their values."""
    layer = editor.layer(options.layers, "emmet")
    found = [find_value(editor, fact, layer, options) for fact in facts]
    keys_MU = torch.stack([one.keys_BM.mean(0) for one in found], 1)
    residuals_CU = torch.stack([one.value.delta_C for one in found], 1)
    change = equality(editor.factor(layer, options.ridge), keys_MU, residuals_CU, options.damping)
    notes = [note(editor, layer, one, change) for one in found]
    return Change({editor.tensor(layer): editor.low_rank(layer, change)}, notes)
