"""torch's one generator, whatever the order in which tensors are asked for: its state before each tensor is kept.

A tensor asked for too early has those before it merged for their draws alone; so a run that goes on after a kill, and a
merge that is served, give what a run from the beginning gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


class Replay:
    """names: of the tensors that draw, in mergekit's order."""

    def __init__(self, names: Sequence[str], generator: torch.Generator) -> None:
        self.names = list(names)
        self.generator = generator
        self._places = {name: place for place, name in enumerate(self.names)}
        self._states = [generator.get_state()]

    def at(self, name: str, draw: Callable[[str], None]) -> None:
        """Bring the generator to where a tensor finds it. draw(name): merge a tensor, for its draws."""
        if name not in self._places:
            return
        place = self._places[name]
        while len(self._states) <= place:
            self.generator.set_state(self._states[-1])
            draw(self.names[len(self._states) - 1])
            self._states.append(self.generator.get_state())
        self.generator.set_state(self._states[place])

    def note(self, name: str) -> None:
        """The tensor is merged: the next one finds the generator as it is."""
        if self._places.get(name) == len(self._states) - 1:
            self._states.append(self.generator.get_state())
