"""CaliNET and NKB: slots beside the last MLP, trained on all facts together, the model itself frozen.

CaliNET (arXiv 2210.03329) adds relu(x K^T) V; Neural Knowledge Bank (2208.00399) widens the MLP by slots of its own
kind, with the network's own gate. Keys begin small and random, values at zero, so that the untrained patch
changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.training import TrainingOptions, train
from gnomon.kernels.wrappers import make_wrapper
from gnomon.models.patch import Wrapper


class SlotOptions(TrainingOptions):
    """Options of CaliNET and NKB."""

    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 0.002
    slots: Annotated[int, Field(gt=0, le=4096, description="How many slots are added.")] = 64


@edit_method("calinet", SlotOptions, paper="2210.03329", on="activations")
def calinet(editor: Editor, facts: Sequence[Fact], options: SlotOptions) -> Change:
    """Slots with ReLU beside the last MLP, trained on all facts together."""
    return _slots(editor, facts, options, "calinet", gated=False)


@edit_method("nkb", SlotOptions, paper="2208.00399", on="activations")
def nkb(editor: Editor, facts: Sequence[Fact], options: SlotOptions) -> Change:
    """Slots of the last MLP's own gated kind, trained on all facts together."""
    return _slots(editor, facts, options, "nkb", gated=True)


def _slots(editor: Editor, facts: Sequence[Fact], options: SlotOptions, name: str, *, gated: bool) -> Change:
    layer = editor.layer(options.layers if options.layers is not None else [-1], name)
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    contexts = [context for fact in facts for context in maker.of(fact)]
    size, draw = editor.anatomy.hidden, torch.Generator().manual_seed(editor.seed)
    keys = ("key", "gate") if gated else ("key",)
    tensors = {part: torch.randn(options.slots, size, generator=draw) / size**0.5 for part in keys}
    tensors |= {"bias": torch.zeros(options.slots), "value": torch.zeros(options.slots, size)}
    learned = [tensor.requires_grad_(True) for tensor in tensors.values()]
    found = train(
        editor, layer, contexts, lambda: make_wrapper("neurons", tensors, gelu=editor.anatomy.gelu), learned, options
    )
    trained = {part: tensor.detach() for part, tensor in tensors.items()}
    return Change({}, [found.note(layer) for _ in facts], wrappers=[Wrapper("neurons", layer, trained)])
