"""Rules compiled into one lazy automaton over character classes.

A `Program` holds the nondeterministic automaton of all rules of one view of the text. Its deterministic states are
made when first met (`State`), so building is quick and only what texts really do costs memory; when the cache is full
it is emptied, with the same results. Assertions are decided when the next character is known.
Knows nothing of threads, actions or streams.

Two kinds of deterministic state share the machinery: *context* states follow what must stand before a rule's
sensitive part and run over the whole text; *match* states belong to one place where sensitive parts may begin.
"""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gnomon.errors import UsageError
from gnomon.guard import charset as cs
from gnomon.guard.charset import CharSet
from gnomon.guard.regex import Alt, Boundary, Cat, Chars, Group, Look, Node, Repeat
from gnomon.guard.rows import Rows

MOST_STATES = 60_000
"""Nondeterministic states of one rule: more is refused, since it would only serve to exhaust memory."""
CACHE_STATES = 20_000
END = -1
"""The class of "no more text"."""

Kernel = frozenset[int]


@dataclass(frozen=True)
class Source:
    """One rule as the automaton sees it: what stands before (not part of a match), and what a match is.

    name: for what is wrong with it.
    """

    before: Node | None
    secret: Node
    gate: bool = True
    urgent: bool = False
    name: str = ""


@dataclass(eq=False, slots=True)
class State:
    """One deterministic state. next: per class a State, None (dead) or UNKNOWN; accepts: class -> rules that end here.

    gate: a rule that holds text back may still match. urgent: urgent rules whose match is complete already.
    """

    id: int
    kernel: Kernel
    mask: int
    next: list[Any]
    gate: bool
    urgent: tuple[int, ...]
    accepts: dict[int, tuple[int, ...]] = field(default_factory=dict)
    last: tuple[int, ...] | None = None  # rules whose match ends with the text; None: not known yet


UNKNOWN = object()


class Program:
    """The automaton of several rules. classes: how characters are told apart; rules: numbered by their position."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self.any_urgent = any(source.urgent for source in self.sources)
        self._lock = threading.RLock()
        self.sets: list[CharSet] = []
        self._set_ids: dict[CharSet, int] = {}
        # The nondeterministic automaton: per state its kind and its successors.
        self.test: list[int] = []  # set id of a character state; -1: no character state
        self.look: list[tuple[str, int, bool] | None] = []  # (behind | ahead | word | noword, set id, edge)
        self.after: list[tuple[int, ...]] = []
        self.final: list[int] = []  # rule accepted here, or -1
        self.owner: list[int] = []
        self.word = self._set(cs.WORD)
        self.roots: list[int] = []
        contexts: list[int] = []
        self.context_rules: dict[int, int] = {}
        for rule, source in enumerate(self.sources):
            self._rule, self._name = rule, source.name or str(rule)
            self._budget = MOST_STATES
            start = self._build(source.secret, self._state(final=rule))
            if source.before is None:
                self.roots.append(start)
            else:
                self.context_rules[rule] = start
                contexts.append(self._build(source.before, self._state(final=rule)))
        self.contexts = frozenset(contexts)
        self._make_classes()
        self._looks_back = [self._sees_previous(state) for state in range(len(self.test))]
        self.begin_mask = 1
        behind = {look[1] for look in self.look if look is not None and look[0] != "ahead"}
        self._visible = 1 | sum(2 << number for number in behind)
        self.flush()

    # -- building -----------------------------------------------------------------------------------------------

    def _set(self, chars: CharSet) -> int:
        if chars not in self._set_ids:
            self._set_ids[chars] = len(self.sets)
            self.sets.append(chars)
        return self._set_ids[chars]

    def _state(
        self,
        *after: int,
        test: int = -1,
        look: tuple[str, int, bool] | None = None,
        final: int = -1,
    ) -> int:
        self._budget -= 1
        if self._budget < 0:
            raise UsageError(
                f"The rule `{self._name}` needs more than {MOST_STATES} states.",
                hint="Counted repetitions multiply when nested: make the counts smaller or open-ended.",
            )
        self.test.append(test)
        self.look.append(look)
        self.after.append(after)
        self.final.append(final)
        self.owner.append(self._rule)
        return len(self.test) - 1

    def _build(self, node: Node, after: int) -> int:
        """States for `node` that lead to `after`; returns where they begin."""
        if isinstance(node, Chars):
            return self._state(after, test=self._set(node.chars))
        if isinstance(node, Look):
            return self._state(after, look=(node.where, self._set(node.chars), node.edge))
        if isinstance(node, Boundary):
            return self._state(after, look=("noword" if node.negated else "word", self.word, False))
        if isinstance(node, Group):
            return self._build(node.node, after)
        if isinstance(node, Cat):
            for part in reversed(node.parts):
                after = self._build(part, after)
            return after
        if isinstance(node, Alt):
            return self._state(*[self._build(option, after) for option in node.options])
        return self._build_repeat(node, after)

    def _build_repeat(self, node: Repeat, after: int) -> int:
        if node.high is None:
            loop = self._state()
            self.after[loop] = (self._build(node.node, loop), after)
            after = loop
        else:
            done = after
            for _ in range(node.high - node.low):
                after = self._state(self._build(node.node, after), done)
        for _ in range(node.low):
            after = self._build(node.node, after)
        return after

    def _make_classes(self) -> None:
        """Characters that no rule tells apart share a class."""
        bounds = sorted({0} | {edge for one in self.sets for low, high in one for edge in (low, high + 1)})
        signature = [0] * len(bounds)
        for number, one in enumerate(self.sets):
            for low, high in one:
                for place in range(bisect_right(bounds, low) - 1, bisect_right(bounds, high)):
                    signature[place] |= 1 << number
        known: dict[int, int] = {}
        self._bounds = bounds
        self._class_at = [known.setdefault(one, len(known)) for one in signature]
        self.class_count = len(known)
        self.signatures = list(known)
        if self.class_count > 255:
            raise UsageError(f"The rules tell {self.class_count} kinds of characters apart; at most 255 are possible.")
        self.end = bytes([self.class_count])
        """The class of the text's end, as walks read it."""
        self._latin = bytes(self._class_at[bisect_right(bounds, code) - 1] for code in range(256))
        self._wide_bounds = np.array(bounds, np.uint32)
        self._wide_classes = np.array(self._class_at, np.uint8)
        self._others: dict[int, int] = {}

    def classify(self, text: str) -> bytes:
        """One class per character."""
        if text.isascii():
            return text.encode("ascii").translate(self._latin)
        if len(text) > 64:
            codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
            return self._wide_classes[np.searchsorted(self._wide_bounds, codes, side="right") - 1].tobytes()
        return bytes([self.class_of(ord(character)) for character in text])

    def class_of(self, code: int) -> int:
        if code < 256:
            return self._latin[code]
        found = self._others.get(code)
        if found is None:
            found = self._others[code] = self._class_at[bisect_right(self._bounds, code) - 1]
            if len(self._others) > 100_000:
                self._others.clear()
        return found

    def _sees_previous(self, state: int) -> bool:
        """Whether an assertion about the previous character can be met before the next one is read."""
        seen, stack = {state}, [state]
        while stack:
            look = self.look[at := stack.pop()]
            if look is not None and look[0] != "ahead":
                return True
            if self.test[at] < 0:
                for other in self.after[at]:
                    if other not in seen:
                        seen.add(other)
                        stack.append(other)
        return False

    # -- running ------------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Forget all deterministic states. Those still held by threads go on working and are made anew as met."""
        self._states: dict[tuple[Kernel, int], State] = {}
        self.generation = getattr(self, "generation", -1) + 1
        self._context_start: State | None = None
        self._first: dict[tuple[int, tuple[int, ...]], State | None] = {}
        self.first_after: list[Any] = [UNKNOWN] * (self.class_count + 1)  # per class of the character before; -1: none
        self.table: list[State] = []
        self.rows = Rows(self.class_count, self.table, lambda rules: any(self.sources[one].urgent for one in rules))

    def mask_after(self, character_class: int) -> int:
        """What is to be known of the previous character: a bit per set, shifted; bit 0: there was none."""
        return self.signatures[character_class] << 1 & self._visible

    def context_start(self) -> State | None:
        """Where contexts are before the text; None when no rule has one."""
        if self._context_start is None and self.contexts:
            self._context_start = self.state(self.contexts, self.begin_mask)
        return self._context_start

    def begin_after(self, character_class: int, rules: tuple[int, ...]) -> State | None:
        """`match_start` after a character of this class (-1: none), noted for walks."""
        mask = self.begin_mask if character_class < 0 else self.mask_after(character_class)
        found = self.match_start(mask, rules)
        if not rules:
            self.first_after[character_class] = found
        self.rows.begin(character_class, rules, -1 if found is None else found.id)
        return found

    def match_start(self, mask: int, rules: tuple[int, ...] = ()) -> State | None:
        """The state of a new thread: the rules without context, and those whose context ended here."""
        key = (mask, rules)
        try:
            return self._first[key]
        except KeyError:
            kernel = frozenset([*self.roots, *(self.context_rules[rule] for rule in rules)])
            found = self._first[key] = self.state(kernel, mask) if kernel else None
            return found

    def state(self, kernel: Kernel, mask: int) -> State:
        """The one State of these nondeterministic states (and of what was before, where that matters)."""
        with self._lock:
            return self._state_of(kernel, mask)

    def _state_of(self, kernel: Kernel, mask: int) -> State:
        if mask and not any(self._looks_back[one] for one in kernel):
            mask = 0
        found = self._states.get((kernel, mask))
        if found is None:
            gate = any(self.sources[self.owner[one]].gate for one in kernel)
            urgent = tuple(sorted({self.owner[one] for one in kernel if self.sources[self.owner[one]].urgent}))
            done = self._complete(kernel) if urgent else ()
            number = len(self.table)
            found = State(number, kernel, mask, [UNKNOWN] * self.class_count, gate, done)
            self._states[(kernel, mask)] = found
            self.table.append(found)
            self.rows.add(gate, bool(done))
        return found

    def step(self, state: State, character_class: int) -> State | None:
        """The state after one more character; fills `state.accepts` with rules whose match ends before it."""
        with self._lock:
            if len(self.table) > CACHE_STATES:
                self.flush()
            return self._step(state, character_class)

    def _step(self, state: State, character_class: int) -> State | None:
        closure = self._closure(state.kernel, state.mask, character_class)
        accepts = tuple(sorted({self.final[one] for one in closure if self.final[one] >= 0}))
        if accepts:
            state.accepts[character_class] = accepts
        signature, test = self.signatures[character_class], self.test
        kernel = {self.after[one][0] for one in closure if test[one] >= 0 and signature >> test[one] & 1}
        if self.contexts and self.contexts <= state.kernel:
            kernel |= self.contexts  # what stands before a match may begin anywhere
        result = self.state(frozenset(kernel), self.mask_after(character_class)) if kernel else None
        state.next[character_class] = result
        if state.id < len(self.table) and self.table[state.id] is state:
            self.rows.set(state.id, character_class, -1 if result is None else result.id, accepts)
        return result

    def at_end(self, state: State) -> tuple[int, ...]:
        """Rules whose match ends where the text ends."""
        if state.last is None:
            with self._lock:
                closure = self._closure(state.kernel, state.mask, END)
                state.last = tuple(sorted({self.final[one] for one in closure if self.final[one] >= 0}))
                if state.id < len(self.table) and self.table[state.id] is state:
                    self.rows.set(state.id, self.class_count, -1, state.last)
        return state.last

    def _closure(self, kernel: Kernel, mask: int, character_class: int) -> set[int]:
        seen = set(kernel)
        stack = list(kernel)
        while stack:
            at = stack.pop()
            look = self.look[at]
            if self.test[at] >= 0 or (look is not None and not self._holds(look, mask, character_class)):
                continue
            for other in self.after[at]:
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
        return seen

    def _holds(self, look: tuple[str, int, bool], mask: int, character_class: int) -> bool:
        where, number, edge = look
        before = bool(mask >> (number + 1) & 1)
        if where == "behind":
            return before or (edge and bool(mask & 1))
        after = character_class != END and bool(self.signatures[character_class] >> number & 1)
        if where == "ahead":
            return after or (edge and character_class == END)
        return (before != after) == (where == "word")

    def _complete(self, kernel: Kernel) -> tuple[int, ...]:
        """Urgent rules that are matched whatever comes next."""
        seen, stack = set(kernel), list(kernel)
        while stack:
            at = stack.pop()
            if self.test[at] < 0 and self.look[at] is None:
                for other in self.after[at]:
                    if other not in seen:
                        seen.add(other)
                        stack.append(other)
        found = {self.final[one] for one in seen if self.final[one] >= 0}
        return tuple(sorted(rule for rule in found if self.sources[rule].urgent))
