"""GRACE: a codebook in place of one MLP's answer, with a deferral radius per key (arXiv 2211.11031).

Each place of a text that predicts a token of a target is a key (what enters the MLP there); its value, found by
gradient, is what the MLP answers within the key's radius. New keys join by the paper's algorithm 1. Two things
are ours: every token of a text is looked up for itself, so that a row's bits are its own, and a target of several
tokens has a key for each; and a radius begins as a share of the distance to the same place in sentences about other
subjects, so that no unit has to be guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contexts import Context, Contexts
from gnomon.edit.contrast import other_facts
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.training import TrainingOptions, positions, train
from gnomon.kernels.wrappers import make_wrapper
from gnomon.models.patch import Wrapper

DEPTH = 2 / 3
"""Where the codebook lies, as a share of the depth: late enough that the last token knows what is asked."""
OTHERS = 12
"""Other subjects whose sentences bound a radius."""


class GraceOptions(TrainingOptions):
    """GRACE's options."""

    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam), in RMS of the unedited answer.")] = 0.5
    radius: Annotated[
        float, Field(gt=0, lt=1, description="A new key's radius, in distances to the nearest other subject's place.")
    ] = 0.5


@dataclass
class Book:
    """Keys with radii, labels and values, in the order they came."""

    keys: list[Tensor] = field(default_factory=list)
    radii: list[float] = field(default_factory=list)
    labels: list[tuple[int, ...]] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def place(self, key_C: Tensor, radius: float, label: tuple[int, ...], value_C: Tensor) -> None:
        """Algorithm 1: a key far from all joins; one near a key of its label widens that key's radius; one near a key
        of another label joins, and both radii shrink to half their distance.
        """
        near, distance = self._nearest(key_C)
        if near is None or distance > radius + self.radii[near]:
            self._add(key_C, radius, label, value_C)
        elif self.labels[near] == label:
            self.radii[near] = max(self.radii[near], distance)
        else:
            half = distance / 2
            self.radii[near] = min(self.radii[near], half)
            self._add(key_C, min(radius, half), label, value_C)

    def tensors(self) -> dict[str, Tensor]:
        return {
            "key": torch.stack(self.keys).float(),
            "radius": torch.tensor(self.radii, dtype=torch.float32),
            "value": torch.stack(self.values).float(),
        }

    def _nearest(self, key_C: Tensor) -> tuple[int | None, float]:
        if not self.keys:
            return None, 0.0
        distances = (torch.stack(self.keys).double() - key_C.double()).norm(dim=1)
        return int(distances.argmin()), float(distances.min())

    def _add(self, key_C: Tensor, radius: float, label: tuple[int, ...], value_C: Tensor) -> None:
        self.keys.append(key_C)
        self.radii.append(radius)
        self.labels.append(label)
        self.values.append(value_C)


@edit_method("grace", GraceOptions, paper="2211.11031", on="activations")
def grace(editor: Editor, facts: Sequence[Fact], options: GraceOptions) -> Change:
    """A codebook answers in place of one MLP near the edited places, and nowhere else."""
    deep = round(DEPTH * len(editor.anatomy.layers))
    layer = editor.layer(options.layers if options.layers is not None else [deep], "grace")
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    book, notes = Book(), []
    for fact in facts:
        contexts = maker.of(fact)
        keys_nC, answers_nC = _places(editor, layer, contexts)
        radius = options.radius * _distance(editor, layer, maker, fact, keys_nC)
        value_nC = answers_nC.clone().requires_grad_(True)
        tensors = {"key": keys_nC, "radius": torch.full((len(keys_nC),), radius), "value": value_nC}
        unit = float(answers_nC.norm(dim=1).mean()) / answers_nC.shape[1] ** 0.5
        scaled = options.model_copy(update={"rate": options.rate * unit})
        found = train(editor, layer, contexts, lambda t=tensors: make_wrapper("codebook", t), [value_nC], scaled)  # type: ignore[misc]
        labels = [c.target_ids[j:] for c in contexts for j in range(len(c.target))]
        before = len(book.keys)
        for key, label, value in zip(keys_nC, labels, value_nC.detach(), strict=True):
            book.place(key, radius, label, value)
        note: dict[str, Any] = {**found.note(layer), "radius": round(radius, 3), "keys": len(book.keys) - before}
        notes.append(note)
    return Change({}, notes, wrappers=[Wrapper("codebook", layer, book.tensors())])


def _places(editor: Editor, layer: int, contexts: Sequence[Context]) -> tuple[Tensor, Tensor]:
    """What enters the MLP and what it answers where the targets are predicted -> [n, C] each."""
    rows = Rows.align([c.inputs for c in contexts], [0] * len(contexts))
    at = positions(contexts)
    row, token = torch.tensor([b for b, _ in at]), torch.tensor([t for _, t in at])
    entering = editor.passes.mlp_inputs(rows, [layer])[layer][row, token]
    inner = editor.passes.keys(rows, [layer])[layer][row, token]
    return entering.float(), inner.float() @ editor.anatomy.downs[layer].weight_CM.float().T


def _distance(editor: Editor, layer: int, maker: Contexts, fact: Fact, keys_nC: Tensor) -> float:
    """Of the keys, the least distance to what enters the MLP in sentences about other subjects, from these on."""
    others = [context for other in other_facts(fact, OTHERS) for context in maker.of(other)]
    rows = Rows.align([c.inputs for c in others], [0] * len(others))
    entering_BTC = editor.passes.mlp_inputs(rows, [layer])[layer]
    after_BT = torch.arange(rows.ids_BT.shape[1])[None] >= torch.tensor([c.subject for c in others])[:, None]
    rest_nC = entering_BTC[rows.mask_BT.bool() & after_BT].float()
    return float(torch.cdist(keys_nC, rest_nC).min())
