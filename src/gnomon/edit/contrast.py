"""Contrast: the keys that a change must leave alone, taken where they matter most.

The second moment of ordinary text knows little of sentences like the one that is edited. So other names are put in the
subject's place, and the MLP's inner activations there count as keys to be preserved (MEMIT's K_0, arXiv 2210.07229,
chosen per fact). In goes a fact; out come keys of one layer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from gnomon.edit.facts import normalised
from gnomon.edit.passes import Rows

if TYPE_CHECKING:
    from gnomon.edit.editor import Editor
    from gnomon.edit.facts import Fact

NAMES = (
    *("Marie Curie", "Leo Tolstoy", "Winston Churchill", "Diego Rivera", "Serena Williams", "Ravi Shankar"),
    *("Johann Sebastian Bach", "Miles Davis", "Nelson Mandela", "Angela Merkel", "Hans Zimmer", "Isaac Newton"),
    *("London", "Brazil", "Vienna", "Kyoto", "Lake Victoria", "the Alps", "Heathrow Airport", "Sydney Opera House"),
    *("Toyota", "Siemens", "Google", "IBM", "Harvard University", "the United Nations", "Real Madrid", "Lufthansa"),
    *("Windows 95", "Star Wars", "Friends", "The New York Times", "Honda Civic", "pizza", "Rolling Stone", "C++"),
)
"""Names of all kinds, known to any model: people, places, organisations, works and products."""


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
