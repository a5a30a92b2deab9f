"""The matcher with its inner loop in native code (csrc/matcher.cpp); without a compiler the matcher itself.

Threads, runs and places live in a blob that the native walk reads and writes. Whatever a walk cannot decide (a state
that is not made yet, a run that outgrows the limit, an urgent rule) is decided by the methods of Matcher, on its own
attributes: `_pull` fills these from the blob, `_push` writes them back. Results and saved states are the same.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from gnomon.guard.automaton import Program, State
from gnomon.guard.matcher import Matcher, Run

HEADER = 16
POSITION, CONTEXT, LAST_CLASS, THREADS, RUNS, EVENTS = range(6)
THREAD_ROOM, RUN_ROOM, EVENT_ROOM, FRONTIER, OLDEST, REASON = range(6, 12)
AT_END, UNKNOWN, ATTENTION, FULL = range(4)
NOTE, ABSORB, CLOSE, ASK = range(4)
NEVER, BEFORE = -1, -2
ROOMS = (16, 2, 96)
"""Threads, runs and events that a blob has room for at first; a walk that needs more says so."""


@cache
def native_walk() -> Callable[..., int] | None:
    """The native function, or None where it was not built. It keeps the interpreter's lock: walks are short."""
    from gnomon.kernels import _native

    for path in sorted(_native.folder().glob("libgnomon_matcher.*")):
        walk = ctypes.PyDLL(str(path)).gnomon_matcher_walk
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        walk.argtypes = [pointer, ctypes.c_char_p, number, number, pointer, number]
        walk.restype = number
        return walk
    return None


def make_matcher(
    program: Program, max_hold: int, accept: Callable[[int, int, int], bool], overflow: Mapping[int, str]
) -> Matcher:
    """The quickest matcher there is here."""
    return (Matcher if native_walk() is None else NativeMatcher)(program, max_hold, accept, overflow)


class NativeMatcher(Matcher):
    """A Matcher whose common steps are taken natively."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._walk: Any = native_walk()
        self._rooms = ROOMS
        self._rows = self.program.rows
        self._table = ctypes.addressof(self._rows.table)
        self._end = self.program.end
        self._make_blob()
        self._blob[CONTEXT] = -1 if self.context is None else self._number(self.context)
        self._blob[LAST_CLASS] = -1
        if self._rows is not self.program.rows:
            self._push()

    def _make_blob(self) -> None:
        threads, runs, events = self._rooms
        self._runs_at = HEADER + 3 * threads
        self._events_at = self._runs_at + 4 * runs
        blob: Any = _blob_type(self._events_at + 4 * events)()
        blob[THREAD_ROOM : EVENT_ROOM + 1] = self._rooms
        self._blob: Any = blob
        self._address = ctypes.addressof(blob)

    # -- the blob -------------------------------------------------------------------------------------------------

    def _push(self) -> None:
        """The attributes into the blob, as states of the program's present table."""
        program = self.program
        self._rows = program.rows
        self._table = ctypes.addressof(self._rows.table)
        owners: dict[int, int] = {}
        for state, start in self.threads.items():
            number = self._number(state)
            if number not in owners:
                owners[number] = start
            elif start in self.ends:
                self._absorb(owners[number], start)
        runs = [(self._number(run.state), run.start, run.end, run.rule) for run in self.runs if run.state is not None]
        wanted = (_room(self._rooms[0], len(owners) + 1), _room(self._rooms[1], len(runs) + 1))
        wanted_events = _room(self._rooms[2], 4 * wanted[0] + wanted[1])
        if (*wanted, wanted_events) != self._rooms:
            self._rooms = (*wanted, wanted_events)
            self._make_blob()
        blob = self._blob
        context = -1 if self.context is None else self._number(self.context)
        blob[POSITION : EVENTS + 1] = (self.position, context, self.last_class, len(owners), len(runs), 0)
        flat: list[int] = []
        for number, start in owners.items():
            flat += (number, start, BEFORE if start in self.ends else NEVER)
        blob[HEADER : HEADER + len(flat)] = flat
        blob[self._runs_at : self._runs_at + 4 * len(runs)] = [value for run in runs for value in run]
        blob[FRONTIER] = Matcher.frontier.fget(self)  # type: ignore[attr-defined]
        blob[OLDEST] = Matcher.first_start.fget(self)  # type: ignore[attr-defined]
        if self._rows is not program.rows:
            self._push()  # a state was made anew, and that emptied the table

    def _number(self, state: State) -> int:
        table = self.program.table
        if state.id < len(table) and table[state.id] is state:
            return state.id
        return self.program.state(state.kernel, state.mask).id

    def _pull(self) -> None:
        """The blob into the attributes."""
        blob, states = self._blob, self._rows.states
        live, running = blob[THREADS], blob[RUNS]
        self.position, self.last_class = blob[POSITION], blob[LAST_CLASS]
        self.mask = self.program.begin_mask if self.last_class < 0 else self.program.mask_after(self.last_class)
        self.context = None if blob[CONTEXT] < 0 else states[blob[CONTEXT]]
        flat = blob[HEADER : HEADER + 3 * live]
        self.threads = {states[flat[at]]: flat[at + 1] for at in range(0, len(flat), 3)}
        flat = blob[self._runs_at : self._runs_at + 4 * running]
        self.runs = [Run(flat[at + 1], flat[at + 2], flat[at + 3], states[flat[at]]) for at in range(0, len(flat), 4)]

    # -- text in --------------------------------------------------------------------------------------------------

    def feed(self, text: str, *, last: bool = False) -> None:
        if self.stopped is not None:
            return
        program, blob = self.program, self._blob
        classes, place = program.classify(text), 0
        count = limit = len(classes)
        if last:
            classes, limit = classes + self._end, count + 1
        if self._rows is not program.rows:
            self._pull()
            self._push()
        while place < limit:
            blob = self._blob
            place = self._walk(self._table, classes, place, limit, self._address, self.max_hold)
            reason = blob[REASON]
            asked = self._read_events(blob[EVENTS]) if blob[EVENTS] else ()
            if reason == AT_END:
                self.finished = last
                break
            self._pull()
            if reason == ATTENTION:
                if self.stopped is None and asked:
                    self._ask(list(asked))
                if self.threads:
                    self._hold_no_longer()
            elif reason == UNKNOWN and place < count:
                self._advance(classes[place])
                place += 1
            self._push()  # makes room, too
            if self._is_stopped() or (reason == UNKNOWN and place == limit - 1 == count):
                break
        self.position = self._blob[POSITION]
        if self._blob[RUNS] or self.runs:
            self._pull()
        if last:
            self.finish()

    def _is_stopped(self) -> bool:
        return self.stopped is not None

    def _read_events(self, count: int) -> list[tuple[State, int]]:
        """What the walk told, in its order; returns what it asks."""
        blob, sets, asked = self._blob, self._rows.sets, []
        flat = blob[self._events_at : self._events_at + 4 * count]
        blob[EVENTS] = 0
        for at in range(0, len(flat), 4):
            kind, start, number, place = flat[at : at + 4]
            if kind == NOTE:
                self._note(sets[number], start, place)
            elif kind == ABSORB:
                if number in self.ends:
                    self._absorb(start, number)
            elif kind == CLOSE:
                self.closed_runs.append(Run(start, place, number, None))
            else:
                asked.append((self._rows.states[number], start))
        return asked

    def finish(self) -> None:
        if self.finished:
            return
        blob = self._blob
        if blob[THREADS] or blob[RUNS]:
            walked = 0
            if self.stopped is None and self._rows is self.program.rows:
                walked = self._walk(self._table, self._end, 0, 1, self._address, self.max_hold)
            if walked:
                self._read_events(blob[EVENTS])
                self.runs = []
            else:
                self._pull()
                super().finish()
        self.finished = True
        blob[THREADS] = blob[RUNS] = 0
        blob[FRONTIER] = blob[OLDEST] = self.position

    # -- what is known --------------------------------------------------------------------------------------------

    @property
    def frontier(self) -> int:
        place: int = self._blob[FRONTIER]
        return place

    @property
    def first_start(self) -> int:
        place: int = self._blob[OLDEST]
        return place

    def starts(self) -> set[int]:
        return set(self._blob[HEADER + 1 : HEADER + 3 * self._blob[THREADS] : 3])

    # -- keeping --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        self._pull()
        return super().state()

    def restore(self, saved: Mapping[str, Any]) -> None:
        super().restore(saved)
        self._push()


@cache
def _blob_type(size: int) -> type[ctypes.Array[ctypes.c_int64]]:
    return ctypes.c_int64 * size


def _room(have: int, need: int) -> int:
    while have < need:
        have *= 2
    return have
