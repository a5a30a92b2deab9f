"""AlphaEdit: MEMIT's change projected into the null space of ordinary keys (arXiv 2410.02355), for edits in sequence.

The null space is chosen by energy, not by the paper's fixed threshold, which in small models marks directions that
carry a tenth or more of the keys' energy. What earlier edits of the same sequence must keep (K_p K_p^T, per
layer) travels in the patch and is taken up again when the next edit is made on the model that wears it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.methods.memit import SpreadOptions, as_change, spread
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.solve import Factors, NullSpace, null_space


class AlphaEditOptions(SpreadOptions):
    """AlphaEdit's options."""

    null_energy: Annotated[float, Field(gt=0, lt=1, description="Share of tr(C) that the null space may hold.")] = 0.1
    damping: Annotated[float, Field(gt=0, description="Weight of a small change (L2).")] = 0.1


@edit_method("alphaedit", AlphaEditOptions, paper="2410.02355")
def alphaedit(editor: Editor, facts: Sequence[Fact], options: AlphaEditOptions) -> Change:
    """A batch of facts written where ordinary text has no energy; for long sequences of edits."""
    layers = editor.layers(options.layers, "alphaedit")
    history: dict[int, Tensor] = {}
    spaces: dict[int, NullSpace] = {}

    def solve(layer: int, keys_MB: Tensor, residuals_CB: Tensor) -> Factors:
        spaces[layer] = NullSpace.of(editor.moment(layer).mean_MM, options.null_energy)
        known = _known(editor, layer)
        change = null_space(spaces[layer], keys_MB, residuals_CB, options.damping, known)
        keys = keys_MB.double()
        history[layer] = keys @ keys.T if known is None else known.double() + keys @ keys.T
        return change

    pending, notes = spread(editor, facts, layers, options, solve)
    change = as_change(editor, pending, notes)
    about: dict[str, Any] = {
        "null_space": {
            str(layer): {"directions": space.basis_MN.shape[1], "energy": round(space.energy, 5)}
            for layer, space in spaces.items()
        }
    }
    return Change(change.deltas, notes, {_name(layer): h.float() for layer, h in history.items()}, about)


def _name(layer: int) -> str:
    return f"alphaedit.keys.{layer}"


def _known(editor: Editor, layer: int) -> Tensor | None:
    """What the latest patch of the sequence remembers of this layer's keys."""
    for patch in reversed(editor.standing):
        if _name(layer) in patch.attachments:
            return patch.attachments[_name(layer)]
    return None
