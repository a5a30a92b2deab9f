"""Contrast: the keys that a change must leave alone, taken where they matter most.

The second moment of ordinary text knows little of sentences like the one that is edited. So other names are put in the
subject's place, and the MLP's inner activations there count as keys to be preserved (MEMIT's K_0, arXiv 2210.07229,
chosen per fact). In goes a fact; out come keys of one layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gnomon.edit.facts import Fact, normalised
from gnomon.edit.passes import Rows
from gnomon.edit.solve import Factor

if TYPE_CHECKING:
    from gnomon.edit.editor import Editor

NAMES = (
    *("Marie Curie", "Leo Tolstoy", "Winston Churchill", "Diego Rivera", "Serena Williams", "Ravi Shankar"),
    *("Johann Sebastian Bach", "Miles Davis", "Nelson Mandela", "Angela Merkel", "Hans Zimmer", "Isaac Newton"),
    *("London", "Brazil", "Vienna", "Kyoto", "Lake Victoria", "the Alps", "Heathrow Airport", "Sydney Opera House"),
    *("Toyota", "Siemens", "Google", "IBM", "Harvard University", "the United Nations", "Real Madrid", "Lufthansa"),
    *("Windows 95", "Star Wars", "Friends", "The New York Times", "Honda Civic", "pizza", "Rolling Stone", "C++"),
)
"""Names of all kinds, known to any model: people, places, organisations, works and products."""


class Avoided:
    """C + contrast * mean of k k^T over the contrast keys of a batch of facts, factorised per layer."""

    def __init__(self, editor: Editor, facts: Sequence[Fact], contrast: float) -> None:
        self.editor, self.facts, self.contrast = editor, facts, contrast

    def moment(self, layer: int) -> Tensor:
        """[M, M] float64."""
        mean_MM = self.editor.moment(layer).mean_MM.double()
        if not self.contrast:
            return mean_MM
        total, count = torch.zeros_like(mean_MM), 0
        for fact in self.facts:
            keys_MN = contrast_keys(self.editor, fact, layer)
            total += (keys_MN @ keys_MN.T).double()
            count += keys_MN.shape[1]
        return mean_MM + self.contrast / count * total

    def factor(self, layer: int, ridge: float) -> Factor:
        """Raises EditError when it cannot be inverted."""
        return Factor.of(self.moment(layer), ridge) if self.contrast else self.editor.factor(layer, ridge)


def other_facts(fact: Fact, most: int) -> list[Fact]:
    """The same fact of other subjects, at most so many: evenly taken from the names."""
    start, end = fact.subject_span()
    before, after = fact.prompt[:start], fact.prompt[end:]
    own = set(normalised(fact.subject or "").split())
    usable = [n for n in NAMES if not own & set(normalised(n).split()) and n not in before + after]
    chosen = usable[:: max(1, len(usable) // most)][:most]
    return [Fact(before + name + after, name, fact.target) for name in chosen]


def contrast_keys(editor: Editor, fact: Fact, layer: int) -> Tensor:
    """Keys at every token of the fact's prompt with other names in it -> [M, N]."""
    start, end = fact.subject_span()
    own = set(normalised(fact.subject or "").split())
    others = [name for name in NAMES if not own & set(normalised(name).split())]
    prompts = [fact.prompt[:start] + name + fact.prompt[end:] for name in others]
    ids = [editor.model.encode(prompt) for prompt in prompts]
    rows = Rows.align(ids, [0] * len(ids))
    keys_BTM = editor.passes.keys(rows, [layer])[layer]
    return keys_BTM[rows.mask_BT.bool()].T
