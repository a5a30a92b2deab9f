"""The exact-liveness matcher: text in, in any pieces; matches out, and up to where no match can begin any more.

Every position begins a thread (a State of the Program and where it began); two threads in the same state have the same
future, so the earlier one stands for both. Text before `frontier`, the begin of the earliest live thread whose rules
hold text back, can never be part of a match that is not known yet: that is the least that must be held.

A rule's matches are, for every place where one can begin, the longest one; of several that end together the earliest.
All of it depends on the text alone, never on the pieces. Knows nothing of actions, filters or views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gnomon.guard.automaton import UNKNOWN, Program, State

MAX_HOLD = 4096


class Match(NamedTuple):
    """Rule number, and where in the text. overflow: a run that outgrew max_hold, taken as one."""

    start: int
    end: int
    rule: int
    overflow: bool = False


@dataclass
class Run:
    """Text that is part of a match which outgrew max_hold and has not ended yet."""

    start: int
    end: int
    rule: int
    state: State | None


@dataclass
class Matcher:
    """One text against one program. accept: asked of an urgent rule's match; True stops all matching there.

    overflow: rule -> "redact_run" (its run counts as a match) | "block" (stops) | "release" (let go, as a match).
    """

    program: Program
    max_hold: int = MAX_HOLD
    accept: Callable[[int, int, int], bool] = field(default=lambda rule, start, end: True)
    overflow: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        program = self.program
        self.position = 0
        self.mask = program.begin_mask
        self.last_class = -1  # of the last character; -1: there was none
        self.context: State | None = program.context_start()
        self.threads: dict[State, int] = {}
        self.ends: dict[int, dict[int, int]] = {}  # start -> rule -> where its longest match so far ends
        self.absorbed: dict[int, list[int]] = {}  # start -> later starts in the same state that had matches already
        self.given: set[tuple[int, int]] = set()  # (rule, end) of matches given out
        self.runs: list[Run] = []
        self.closed_runs: list[Run] = []
        self.stopped: Match | None = None
        self.finished = False

    # -- text in ------------------------------------------------------------------------------------------------

    def feed(self, text: str, *, last: bool = False) -> None:
        """More text. After a stop nothing more is looked at. last: and then finish."""
        classes = self.program.classify(text)
        place = 0
        while place < len(classes) and self.stopped is None:
            place = self._run(classes, place)
            if place < len(classes) and self.stopped is None:
                self._advance(classes[place])
                place += 1
        if last:
            self.finish()

    def _run(self, classes: bytes, place: int) -> int:
        """The common case, as fast as Python does it: every step is known, no context ends, nothing is urgent.

        Returns how far that went; `_advance` does one step of any kind.
        """
        if self.runs or self.absorbed or self.program.any_urgent:
            return place
        program, ends, hold = self.program, self.ends, self.max_hold
        first_after, context, threads, before = program.first_after, self.context, self.threads, self.last_class
        position, limit = self.position, len(classes)
        while place < limit:
            c = classes[place]
            if context is not None:
                following = context.next[c]
                if following is UNKNOWN or c in context.accepts:
                    break
            first = first_after[before]
            if first is UNKNOWN or (first is not None and first.next[c] is UNKNOWN):
                break
            known = True
            for state in threads:
                if state.next[c] is UNKNOWN:
                    known = False
                    break
            if not known:
                break
            if first is not None and first not in threads and (first.next[c] is not None or c in first.accepts):
                threads[first] = position
            moved: dict[State, int] = {}
            for state, start in threads.items():
                if c in state.accepts:
                    noted = ends.get(start)
                    if noted is None:
                        noted = ends[start] = {}
                    for rule in state.accepts[c]:
                        noted[rule] = position
                after = state.next[c]
                if after is not None:
                    if after not in moved:
                        moved[after] = start
                    elif start in ends:
                        self._absorb(moved[after], start)
            threads = moved
            if context is not None:
                context = following
            before = c
            place += 1
            position += 1
            if self.absorbed or (moved and position - next(iter(moved.values())) >= hold):
                break
        if position > self.position:
            self.context, self.threads, self.position = context, threads, position
            self.mask, self.last_class = program.mask_after(before), before
            if threads:
                self._hold_no_longer()
        return place

    def finish(self) -> None:
        """No more text comes: what could still have become a match will not."""
        if self.finished:
            return
        self.finished = True
        at_end = self.program.at_end
        for state, start in self.threads.items():
            if (rules := at_end(state)) and (self.stopped is None or state.gate):
                self._note(rules, start, self.position)
        self.threads = {}
        self.closed_runs += self.runs
        self.runs = []

    def _advance(self, c: int) -> None:
        program, at = self.program, self.position
        begun: tuple[int, ...] = ()
        if self.context is not None:
            following = self.context.next[c]
            if following is UNKNOWN:
                following = program.step(self.context, c)
            begun = self.context.accepts.get(c, ())
            self.context = following
        first = program.begin_after(self.last_class, begun)
        if first is not None and first not in self.threads:
            self.threads[first] = at
        moved: dict[State, int] = {}
        urgent: list[tuple[State, int]] = []
        for state, start in self.threads.items():
            following = state.next[c]
            if following is UNKNOWN:
                following = program.step(state, c)
            if c in state.accepts:
                self._note(state.accepts[c], start, at)
            if following is None:
                continue
            if following in moved:
                if start in self.ends:
                    self._absorb(moved[following], start)
                continue
            moved[following] = start
            if following.urgent:
                urgent.append((following, start))
        self.threads = moved
        self.position = at + 1
        self.mask, self.last_class = program.mask_after(c), c
        if self.runs:
            self._advance_runs(c)
        if self.stopped is None and urgent:
            self._ask(urgent)
        if moved:
            self._hold_no_longer()

    def _note(self, rules: tuple[int, ...], start: int, end: int) -> None:
        """These rules match from `start` to `end`."""
        for rule in rules:
            self.ends.setdefault(start, {})[rule] = end
            for later in self.absorbed.get(start, ()):
                self.ends.get(later, {}).pop(rule, None)  # its longest match ends here too, and begins later
            if self.program.sources[rule].urgent and self.stopped is None and self.accept(rule, start, end):
                self.stopped = Match(start, end, rule)

    def _absorb(self, start: int, later: int) -> None:
        """The thread from `later` goes on as the one from `start`; what it matched before stays known."""
        self.absorbed.setdefault(start, []).extend([later, *self.absorbed.pop(later, ())])

    def _ask(self, urgent: list[tuple[State, int]]) -> None:
        for state, start in urgent:
            for rule in state.urgent:
                if self.accept(rule, start, self.position):
                    self.ends.setdefault(start, {})[rule] = self.position
                    self.stopped = Match(start, self.position, rule)
                    return

    # -- runs without an end --------------------------------------------------------------------------------------

    def _hold_no_longer(self) -> None:
        """A thread that holds more than max_hold characters becomes a run: decided, though it has not ended."""
        for state, start in list(self.threads.items()):
            if self.position - start < self.max_hold:
                return
            rules = sorted({self.program.owner[one] for one in state.kernel})
            policies = {self.overflow.get(rule, "redact_run"): rule for rule in reversed(rules) if self._gates(rule)}
            policy = next((one for one in ("block", "redact_run") if one in policies), "release")
            rule = policies.get(policy, rules[0])
            del self.threads[state]
            self.ends.pop(start, None)
            if policy == "block":
                self.stopped = Match(start, self.position, rule, True)
                return
            run = Run(start, self.position, rule, state)
            (self.closed_runs if policy == "release" else self.runs).append(run)

    def _gates(self, rule: int) -> bool:
        return self.program.sources[rule].gate

    def _advance_runs(self, c: int) -> None:
        """Runs grow by this character or end before it. A thread in a run's state is the run's own text."""
        going = []
        for run in self.runs:
            assert run.state is not None
            following = run.state.next[c]
            if following is UNKNOWN:
                following = self.program.step(run.state, c)
            if following is None:
                self.closed_runs.append(run)
                continue
            run.state, run.end = following, self.position
            self.threads.pop(following, None)
            going.append(run)
        self.runs = going

    # -- what is known --------------------------------------------------------------------------------------------

    @property
    def frontier(self) -> int:
        """No match that holds text back and is not known yet begins before here."""
        for state, start in self.threads.items():
            if state.gate:
                return start
        return self.position

    @property
    def first_start(self) -> int:
        """No match at all that may still grow begins before here."""
        return min(self.threads.values(), default=self.position)

    @property
    def oldest(self) -> int:
        """No match at all that is not known yet begins before here: text before it is not needed any more."""
        return min([self.first_start, *self.ends]) if self.ends else self.first_start

    def starts(self) -> set[int]:
        """Where live threads began."""
        return set(self.threads.values())

    def take(self) -> list[Match]:
        """Matches that are final and were not taken yet, by where they begin."""
        found = [Match(run.start, run.end, run.rule, True) for run in self.closed_runs]
        self.closed_runs = []
        if self.ends and self.finished:
            for start, rules in sorted(self.ends.items()):
                for rule, end in rules.items():
                    if (rule, end) not in self.given:
                        self.given.add((rule, end))
                        found.append(Match(start, end, rule))
            self.ends = {}
        elif self.ends:
            gate_limit = self.frontier
            limit = min(gate_limit, self.first_start)
            for start, rules in sorted(self.ends.items()):
                for rule in sorted(rules):
                    if start < (gate_limit if self._gates(rule) else limit):
                        end = rules.pop(rule)
                        if (rule, end) not in self.given:
                            self.given.add((rule, end))
                            found.append(Match(start, end, rule))
                if not rules:
                    del self.ends[start]
            if self.given:
                self.given = {key for key in self.given if key[1] > limit}
            if self.absorbed:
                alive = self.starts()
                self.absorbed = {start: later for start, later in self.absorbed.items() if start in alive}
        return sorted(found)

    # -- keeping --------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as plain values."""

        def plain(state: State | None) -> Any:
            return None if state is None else [sorted(state.kernel), state.mask]

        return {
            "position": self.position,
            "mask": self.mask,
            "last_class": self.last_class,
            "context": plain(self.context),
            "threads": [[plain(state), start] for state, start in self.threads.items()],
            "ends": [[start, rule, end] for start, rules in self.ends.items() for rule, end in rules.items()],
            "absorbed": [[start, later] for start, later in self.absorbed.items()],
            "given": sorted(self.given),
            "runs": [[run.start, run.end, run.rule, plain(run.state)] for run in self.runs],
            "closed_runs": [[run.start, run.end, run.rule, None] for run in self.closed_runs],
            "stopped": self.stopped,
            "finished": self.finished,
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from `state()` of a matcher over the same program."""

        def made(plain: Any) -> Any:
            return None if plain is None else self.program.state(frozenset(plain[0]), plain[1])

        self.position, self.mask, self.finished = saved["position"], saved["mask"], saved["finished"]
        self.last_class = saved["last_class"]
        self.context = made(saved["context"])
        self.threads = {made(plain): start for plain, start in saved["threads"]}
        self.ends = {}
        for start, rule, end in saved["ends"]:
            self.ends.setdefault(start, {})[rule] = end
        self.absorbed = {start: list(later) for start, later in saved["absorbed"]}
        self.given = {(rule, end) for rule, end in saved["given"]}
        self.runs = [Run(a, b, rule, made(plain)) for a, b, rule, plain in saved["runs"]]
        self.closed_runs = [Run(a, b, rule, None) for a, b, rule, _ in saved["closed_runs"]]
        self.stopped = None if saved["stopped"] is None else Match(*saved["stopped"])
