"""An automaton's deterministic states as flat arrays: what the native walk (csrc/matcher.cpp) reads.

The last class is the end of the text. Kept beside the states as they are made, under their owner's lock; a walk runs
under the interpreter's. Sets of rules that end together, or begin together, are numbered; 0 is the empty one.
Knows nothing of what states mean.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Rules = tuple[int, ...]


class Table(ctypes.Structure):
    """`struct Table` of csrc/matcher.cpp."""

    _fields_ = (
        ("classes", ctypes.c_int64),
        ("next", ctypes.c_void_p),
        ("accepts", ctypes.c_void_p),
        ("first", ctypes.c_void_p),
        ("flags", ctypes.c_void_p),
        ("urgent_sets", ctypes.c_void_p),
        ("marks", ctypes.c_void_p),
        ("tick", ctypes.c_int64),
    )


class Rows:
    """The arrays. states: what their first axis stands for; is_urgent: whether a set of rules asks at once."""

    def __init__(self, classes: int, states: Sequence[Any], is_urgent: Callable[[Rules], bool]) -> None:
        self.states = states
        self.is_urgent = is_urgent
        self.count = 0
        self.sets: list[Rules] = [()]
        self._set_ids: dict[Rules, int] = {(): 0}
        self.next = np.zeros((64, classes + 1), np.int32)
        self.accepts = np.zeros((64, classes + 1), np.int32)
        self.flags = np.zeros(64, np.uint8)
        self.marks = np.zeros(64, np.int64)
        self.first = np.zeros((16, classes + 1), np.int32)
        self.urgent_sets = np.zeros(16, np.uint8)
        self.table = Table(classes=classes)
        self._point()

    def _point(self) -> None:
        for name in ("next", "accepts", "first", "flags", "urgent_sets", "marks"):
            setattr(self.table, name, getattr(self, name).ctypes.data)

    def add(self, gate: bool, urgent: bool) -> None:
        """One more state."""
        if self.count == len(self.flags):
            for name in ("next", "accepts", "flags", "marks"):
                setattr(self, name, _doubled(getattr(self, name)))
            self._point()
        self.flags[self.count] = gate | urgent << 1
        self.count += 1

    def set(self, state: int, character_class: int, following: int, ending: Rules) -> None:
        """What comes after a state at a class (-1: nothing), and which rules end before it."""
        if ending:
            self.accepts[state, character_class] = self.number(ending)
        self.next[state, character_class] = following + 2 << 1 | bool(ending)

    def begin(self, character_class: int, rules: Rules, state: int) -> None:
        """The state of a thread that begins after this class (-1: at the begin) with these rules (state -1: none)."""
        self.first[self.number(rules), character_class + 1] = state + 2

    def number(self, rules: Rules) -> int:
        """A set of rules' number."""
        found = self._set_ids.get(rules)
        if found is None:
            found = self._set_ids[rules] = len(self.sets)
            self.sets.append(rules)
            if found == len(self.urgent_sets):
                self.first, self.urgent_sets = _doubled(self.first), _doubled(self.urgent_sets)
                self._point()
            self.urgent_sets[found] = self.is_urgent(rules)
        return found


def _doubled(array: np.ndarray) -> np.ndarray:
    return np.concatenate([array, np.zeros_like(array)])
