"""Steering: a vector added to a layer's output at every token (contrastive activation addition, arXiv 2312.06681).

The vector is the mean difference between the layer's outputs at the end of "PROMPT TARGET" and of "PROMPT OLD", over
all facts given: each is a pair that says which way to go. It changes how a model speaks, not what it knows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact, continued
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, MethodOptions, edit_method
from gnomon.errors import UsageError
from gnomon.models.patch import Wrapper


class SteerOptions(MethodOptions):
    """Options of steering."""

    strength: Annotated[float, Field(description="The vector is multiplied by this; negative: the other way.")] = 2.0


@edit_method("steer", SteerOptions, paper="2312.06681", answers=False, on="activations")
def steer(editor: Editor, facts: Sequence[Fact], options: SteerOptions) -> Change:
    """Add the mean difference between two ways of ending a prompt to a layer's output."""
    middle = len(editor.anatomy.layers) // 2
    layers = editor.anatomy.check_layers(options.layers if options.layers is not None else [middle])
    if missing := [fact.prompt for fact in facts if fact.old is None]:
        raise UsageError(
            f"`steer` goes from an old answer to the target; `{missing[0]}` has no `old`.",
            hint='Give records: {"prompt": ..., "target": ..., "old": ...}.',
            param="facts",
        )
    toward = [editor.model.encode(fact.prompt + fact.continuation) for fact in facts]
    away = [editor.model.encode(fact.prompt + continued(fact.prompt, fact.old or "")) for fact in facts]
    wrappers, notes = [], [dict[str, object](layers=layers) for _ in facts]
    for layer in layers:
        difference_UC = last_outputs(editor, layer, toward) - last_outputs(editor, layer, away)
        vector_C = options.strength * difference_UC.mean(0)
        size = len(vector_C)
        tensors = {"left": torch.zeros(size, 0), "right": torch.zeros(0, size), "bias": vector_C}
        wrappers.append(Wrapper("affine", layer, tensors))
        for note, own in zip(notes, difference_UC, strict=True):
            note[f"cosine_{layer}"] = round(float(torch.cosine_similarity(own, vector_C, dim=0)), 3)
    return Change({}, notes, wrappers=wrappers)


def last_outputs(editor: Editor, layer: int, texts: Sequence[list[int]]) -> Tensor:
    """The layer's output at each text's last token -> [U, C] float32."""
    rows = Rows.align(texts, [0] * len(texts))
    outputs_BTC = editor.passes.layer_outputs(rows, layer)
    return outputs_BTC[torch.arange(len(texts)), torch.tensor([len(ids) - 1 for ids in texts])].float()
