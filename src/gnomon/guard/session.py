"""One text under guard: pieces in, what may leave out. What leaves and what is found depend on the text alone.

Every lane of rules and the lookout of scanners say up to where they are sure; text leaves up to the earliest of these
places, with findings replaced on the way. A block ends the text where the blocked part begins. Held text that never
became safe is dropped, not let out. Knows nothing of tokens, engines or HTTP.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.errors import UsageError
from gnomon.guard.finding import Finding
from gnomon.guard.lane import Hit, Lane
from gnomon.guard.lookout import Lookout
from gnomon.guard.reports import Bound, Reports
from gnomon.guard.step import Step, joined, verdict_of
from gnomon.guard.vault import Vault

SLICE = 1 << 16
"""Characters looked at in one go, so that a huge text needs little memory."""


@dataclass
class Session:
    """The state of one guarded text. waits: a push waits for the scanners' verdicts; else they count when they come."""

    rules: Sequence[Bound]
    lanes: list[Lane]
    lookout: Lookout | None = None
    fingerprint: str = ""
    vault: Vault | None = None
    shadow: bool = False
    message: str = ""
    waits: bool = True

    def __post_init__(self) -> None:
        self._decoder: codecs.IncrementalDecoder | None = None  # once bytes came
        self._text = ""  # from `_base` on
        self._base = 0
        self.length = 0  # characters of the text so far
        self.released = 0  # where the next character to leave lies
        self._waiting: list[Hit] = []
        self._reports = Reports(self.rules, self.shadow)
        self._blocked: Finding | None = None
        self._finished = False
        self._shifts: list[tuple[int, int, int]] = []  # a replaced span, and how much longer its replacement is
        self._ended: Hit | None = None  # a rule ends the text here; a look that is out may end it earlier
        several = len(self.lanes) + (self.lookout is not None) > 1
        self._urgent = any(lane.urgent for lane in self.lanes)
        self._interleave = several and self._urgent

    # -- the public face ----------------------------------------------------------------------------------------

    def push(self, piece: str | bytes) -> str:
        """More text; returns what may leave now. After a block or the end nothing leaves any more."""
        return self.step(piece).text

    def finish(self) -> str:
        """The text is complete; returns what was held and is clean."""
        return self.close().text

    @property
    def findings(self) -> list[Finding]:
        """In the order of the text. What is not decided yet is not in it."""
        return self._reports.all()

    @property
    def verdict(self) -> str:
        """ "pass" | "flag" | "redact" | "block" | "guard_error"."""
        return verdict_of(self.findings)

    @property
    def held(self) -> int:
        """Characters that are here and may not leave yet."""
        return max(self.length - self.released, 0)

    @property
    def behind(self) -> bool:
        """Whether the scanners are so far behind that who pushes without waiting should stop for a while."""
        return self.lookout is not None and self._blocked is None and self.lookout.behind

    def _shift(self, start: int, end: int, more: int) -> None:
        if self.lookout is not None:  # only a scanner's late verdict asks for it
            self._shifts.append((start, end, more))

    def _stretch(self, end: int) -> None:
        """The replacement that stands last replaces more."""
        if self._shifts:
            start, before, more = self._shifts.pop()
            self._shifts.append((start, end, more - (end - before)))

    def shown_at(self, place: int) -> int:
        """Where a place of the text lies in what has left; of one in a replaced span, where its replacement begins."""
        place = min(place, self.released)
        place = next((start for start, end, _ in self._shifts if start < place < end), place)
        return place + sum(more for _, end, more in self._shifts if end <= place)

    # -- steps --------------------------------------------------------------------------------------------------

    def step(self, piece: str | bytes) -> Step:
        text = self._decoded(piece)
        if self._finished:
            raise UsageError("This guard session is finished.", hint="Begin another: guard.session().")
        if self._blocked is not None or not (text or self.lookout):
            return Step(settled=self.released)
        if not text:
            return self._decide()
        steps = [self._advance(text[at : at + SLICE]) for at in range(0, len(text), SLICE)]
        return steps[0] if len(steps) == 1 else joined(steps)

    def whole(self, text: str | bytes) -> str:
        """push and finish in one, for a session that has seen nothing yet."""
        if isinstance(text, bytes) or len(text) > SLICE or self._urgent or self.lookout or self.length:
            return self.push(text) + self.finish()
        self._text, self.length = text, len(text)
        for lane in self.lanes:
            lane.whole(text)
        return self.finish()

    def _decoded(self, piece: str | bytes) -> str:
        """A piece as text; bytes may end inside a character, which a following str ends."""
        if isinstance(piece, bytes):
            if self._decoder is None:
                self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
            return self._decoder.decode(piece)
        if not isinstance(piece, str):
            raise UsageError(f"A piece of text is str or bytes, not {type(piece).__name__}.")
        if self._decoder is None:
            return piece
        rest, self._decoder = self._decoder.decode(b"", True), None
        return rest + piece

    def close(self) -> Step:
        if self._finished:
            return Step(settled=self.released)
        rest = "" if self._decoder is None else self._decoded("")
        before = self._advance(rest) if rest and self._blocked is None else None
        self._finished = True
        last = Step()
        if self._blocked is None:
            last = self._last()
        last = Step(last.text, self.released, last.hidden, last.findings + self._reports.close(None), last.cut)
        return last if before is None else joined([before, last])

    def _last(self) -> Step:
        """Nothing comes any more: wait for the scanners, let out the rest or end it."""
        if self._ended is None:
            for lane in self.lanes:
                lane.finish()
            self._ended = self._stopped()
        if self.lookout is not None:
            if self._ended is None:
                self.lookout.finish(*self._known())
            else:
                self.lookout.poll(most=0)
        if self._ended is not None or (self.lookout is not None and self.lookout.stop is not None):
            return self._decide()
        return self._release(self.length, self.length)

    def _advance(self, text: str) -> Step:
        if self._blocked is not None or self._ended is not None:
            return self._decide() if self._blocked is None else Step(settled=self.released)
        self._text += text
        steps = []
        while text and self._ended is None and self._blocked is None:
            count = len(text) if self.lookout is None else self.lookout.next_point(text)
            piece, text = text[:count], text[count:]
            count = self._feed(piece)
            if self.lookout is not None and count:
                self.lookout.feed(piece[:count], *self._known())
            if self.lookout is not None and self.waits:
                self.lookout.poll(most=0)
                steps.append(self._decide())
        return joined(steps) if steps else self._decide()

    def _feed(self, piece: str) -> int:
        """A piece through the lanes, up to where a rule ends the text -> characters of it that did not end it."""
        count = 0
        for part in piece if self._interleave else (piece,):
            for lane in self.lanes:
                lane.feed(part)
            self.length += len(part)
            self._ended = self._stopped()
            if self._ended is not None:
                break
            count += len(part)
        return count

    def _known(self) -> tuple[int, int]:
        """How far the rules are sure: what they hold back, and what they may still report."""
        frontier = min((lane.frontier for lane in self.lanes), default=self.length)
        return frontier, min((lane.settled for lane in self.lanes), default=self.length)

    def _stopped(self) -> Hit | None:
        stops = [stop for lane in self.lanes if (stop := lane.stopped) is not None]
        return min(stops) if stops else None

    def _decide(self) -> Step:
        """What may leave now, or the end."""
        if self._blocked is not None:
            return Step(settled=self.released)
        frontier, settled = self._known()
        lookout = self.lookout
        if lookout is not None:
            lookout.poll()
            if (stop := lookout.stop) is not None:
                return self._block(stop.hit, stop.limit, stop.settled)
            frontier, settled = min(frontier, lookout.frontier), min(settled, lookout.settled)
        if self._ended is not None and (lookout is None or not lookout.pending):
            return self._block(self._ended, min(self._ended.start, frontier), settled)
        return self._release(frontier, settled)

    def _block(self, hit: Hit, limit: int, settled: int) -> Step:
        """The text ends before the blocked part, and before anything that was still held."""
        step = self._release(limit, min(limit, settled))
        self._waiting = []
        self._blocked = Finding(hit.start, hit.end, self.rules[hit.number].name, "block", hit.score, hit.note)
        closed = self._reports.close(None)
        self._reports.found.append(self._blocked)
        cut = max(limit, self.released)
        return Step(step.text + self.message, cut, step.hidden, (*step.findings, *closed, self._blocked), cut=cut)

    def _release(self, frontier: int, settled: int) -> Step:
        """Let out the text before `frontier`, with what was found in it replaced."""
        runs: list[Hit] = []
        for lane in self.lanes:
            self._waiting += lane.take()
            runs += lane.runs
        if self.lookout is not None:
            self._waiting += self.lookout.take()
        if not self._waiting and not runs:
            text = ""
            if frontier > self.released:
                text, self.released = self._slice(self.released, frontier), frontier
            self._trim()
            return Step(text, self.released, (), self._reports.close(min(frontier, settled)))
        out: list[str] = []
        hidden: list[tuple[int, int]] = []
        later: list[Hit] = []
        for hit in sorted(self._waiting + runs, key=_by_place):
            growing = bool(runs) and hit in runs
            bound = self.rules[hit.number]
            if bound.action == "flag" or self.shadow:
                if hit.start < settled and not growing:
                    self._reports.add(hit)
                elif not growing:
                    later.append(hit)
                continue
            if hit.start >= frontier:
                if not growing:
                    later.append(hit)
                continue
            if hit.start >= self.released:
                replacement = self._replacement(hit, bound)
                out += [self._slice(self.released, hit.start), replacement]
                hidden.append((hit.start, hit.end))
                self._shift(hit.start, hit.end, len(replacement) - (hit.end - hit.start))
                self.released = hit.end
            elif hit.end > self.released:
                hidden.append((self.released, hit.end))
                self._stretch(hit.end)
                self.released = hit.end
            if not growing:
                self._reports.add(hit)
        self._waiting = later
        if frontier > self.released:
            out.append(self._slice(self.released, frontier))
            self.released = frontier
        self._trim()
        return Step("".join(out), self.released, tuple(hidden), self._reports.close(min(frontier, settled)))

    def _slice(self, start: int, end: int) -> str:
        return self._text[start - self._base : end - self._base]

    def _replacement(self, hit: Hit, bound: Bound) -> str:
        if bound.action == "vault":
            if self.vault is None:
                raise UsageError(
                    "The action `vault` needs a vault.", hint='Give one: guard.scan(text, "input", vault=Vault()).'
                )
            return self.vault.placeholder(bound.entity or bound.name, self._slice(hit.start, hit.end))
        return bound.replacement

    def _trim(self) -> None:
        keep = min([self.released, *(hit.start for hit in self._waiting)]) if self._waiting else self.released
        if (drop := keep - self._base) > 256 or drop == len(self._text):
            self._text = self._text[drop:]
            self._base = keep

    # -- keeping ------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything, as plain JSON values, for `Guard.resume`. It holds text that may not leave: keep it safe."""
        if self.vault is not None and len(self.vault):
            raise UsageError("A session with values in its vault cannot be saved.")
        return {
            "fingerprint": self.fingerprint,
            "bytes": "" if self._decoder is None else self._decoder.getstate()[0].hex(),
            "text": self._text,
            "base": self._base,
            "length": self.length,
            "shifts": self._shifts,
            "released": self.released,
            "waiting": [[h.start, h.end, h.number, h.overflow, h.score, h.note] for h in self._waiting],
            **self._reports.state(),
            "blocked": None if self._blocked is None else self._reports.found.index(self._blocked),
            "finished": self._finished,
            "ended": None if self._ended is None else list(self._ended),
            "lanes": [lane.state() for lane in self.lanes],
            "lookout": None if self.lookout is None else self.lookout.state(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        if saved.get("fingerprint") != self.fingerprint:
            raise UsageError("This state was saved by a guard with other rules.", hint="Resume with the same policy.")
        self._decoder = None
        self._decoded(bytes.fromhex(saved["bytes"]))
        self._text, self._base = saved["text"], saved["base"]
        self.length, self.released = saved["length"], saved["released"]
        self._shifts = [(start, end, more) for start, end, more in saved["shifts"]]
        self._waiting = [Hit(*one) for one in saved["waiting"]]
        self._reports.restore(saved)
        self._blocked = None if saved["blocked"] is None else self._reports.found[saved["blocked"]]
        self._finished = saved["finished"]
        self._ended = None if saved["ended"] is None else Hit(*saved["ended"])
        for lane, one in zip(self.lanes, saved["lanes"], strict=True):
            lane.restore(one)
        if self.lookout is not None:
            self.lookout.restore(saved["lookout"])


def _by_place(hit: Hit) -> tuple[int, int, int]:
    return hit.start, -hit.end, hit.number
