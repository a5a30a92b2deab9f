"""The guard in a generation: the prompt's texts before they become tokens, the answer's text before it leaves.

Joins the engine through the capability's two stages; what one prompt's stages share (its vault, what was found in the
prompt) lies in the context's memory. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from gnomon.errors import Blocked
from gnomon.guard.detour import Detour
from gnomon.guard.finding import Finding
from gnomon.guard.guard import Guard
from gnomon.guard.meter import METER
from gnomon.guard.policy import GuardOptions
from gnomon.guard.step import Step, joined
from gnomon.guard.vault import Restorer, Vault
from gnomon.stages import Released, StageContext


class PromptGuard:
    """Checks each text of a prompt. A block refuses the prompt; what is redacted or vaulted never reaches the model."""

    def __init__(self, guard: Guard, context: StageContext) -> None:
        self.guard = guard
        self.memory = context.memory
        self.vault: Vault = self.memory.setdefault("guard.vault", Vault())
        self.findings: list[Finding] = self.memory.setdefault("guard.findings", [])

    def check(self, text: str) -> str:
        self.memory["guard.prompt"] = text
        if self.guard.has_input:
            result = self.guard.scan(self.vault.escaped(text), "input", vault=self.vault)
            self.findings += result.findings
            if result.verdict in ("block", "guard_error"):
                rules = sorted({finding.rule for finding in result.findings if finding.action == "block"})
                raise Blocked(f"The prompt was refused by the guard: {', '.join(rules)}.", param="messages")
            text = result.text
        if self.guard.has_output and self.guard.scan(text).findings:
            self.memory["private_prompt"] = True
        return text


class AnswerGuard:
    """One choice's answer: a session, then placeholders back to the user's own values.

    With a rollback in the policy text leaves in whole tokens, so that what is found later can be taken back at the end
    of one; the session then begins anew with the text that stays.
    """

    def __init__(self, guard: Guard, context: StageContext) -> None:
        self.guard = guard
        self.prompt = context.memory.get("guard.prompt", "")
        self.session = guard.session(prompt=self.prompt, waits=False)
        self.waits = self.session.lookout is not None
        vault = context.memory.get("guard.vault")
        self.restorer = Restorer(vault) if vault is not None and len(vault) else None
        self.settled = 0
        self.prompt_findings: list[Finding] = list(context.memory.get("guard.findings", ()))
        self.told: set[Finding] = set()
        self.shows_held = bool(guard.options.show_held)
        self.rollback = guard.options.on_block.rollback
        self.goes_back = self.rollback is not None
        self.detour: Detour | None = context.memory.pop("guard.detour", None)
        self.retries = self.rollback.retries if self.rollback is not None else 0
        self.ends: deque[int] = deque([0], maxlen=self.rollback.tokens + 1 if self.rollback is not None else 1)
        self.clean = ""  # what the session let out and has not left yet
        self.shown = 0  # characters that left
        self.floor = 0  # of the answer's text: what lies before it has left
        self.again = 0  # characters that a session begun anew will say again
        self.carried: Step | None = None  # what it said already

    # -- text -----------------------------------------------------------------------------------------------------

    def push(self, text: str) -> Released:
        begun = time.perf_counter()
        step = self._fresh(self.session.step(text))
        if self.rollback is not None:
            if (place := self._way_back(step)) is not None:
                self.retries -= 1
                if self.detour is not None:
                    self.detour.armed = True
                self.ends = deque((end for end in self.ends if end <= place), maxlen=self.ends.maxlen)
                METER.went_back()
                told = tuple(f.as_dict() | {"action": "rollback"} for f in step.findings if f.end > place)
                return Released(settled=0, findings=told, back_to=place)
            step = self._in_whole_tokens(step)
        METER.piece(self.session.held, time.perf_counter() - begun)
        return self._released(step)

    @property
    def behind(self) -> bool:
        """Whether its scanners are so far behind that the text should wait for them."""
        return self.session.behind

    def finish(self) -> Released:
        step = self._fresh(self.session.close())
        text, self.clean = self.clean + step.text, ""
        return self._released(step._replace(text=text), last=True)

    def _released(self, step: Step, *, last: bool = False) -> Released:
        text = step.text
        before, self.shown = self.shown, self.shown + len(text)
        if self.restorer is not None:
            text = self.restorer.push(text) + (self.restorer.finish() if last or step.cut is not None else "")
        more, self.settled = max(step.settled - self.settled, 0), max(step.settled, self.settled)
        held = None
        if self.shows_held:
            held = 0 if last or step.cut is not None else self.session.held + len(self.clean)
        return Released(text, more, step.cut, "content_filter", self._findings(step, before), step.hidden, held)

    def _findings(self, step: Step, shown: int | None = None) -> tuple[dict[str, Any], ...]:
        """What was found, not told before. shown: characters that had left when it was."""
        told = [{**finding.as_dict(), "where": "input"} for finding in self.prompt_findings]
        fresh = [finding for finding in step.findings if finding not in self.told]
        for finding in fresh:
            told.append(finding.as_dict())
            if shown is not None and finding.action == "block" and step.cut is not None and finding.start < step.cut:
                start = 0 if self.restorer is not None else self.session.shown_at(finding.start)
                told[-1]["retract"] = [start, shown]
        for finding in (*self.prompt_findings, *fresh):
            METER.found(finding.rule, finding.action)
        self.prompt_findings = []
        self.told.update(fresh)
        return tuple(told)

    # -- going back -----------------------------------------------------------------------------------------------

    def token_ends_at(self, place: int) -> None:
        """A token's text ends here."""
        if place > self.ends[-1]:
            self.ends.append(place)

    def _way_back(self, step: Step) -> int | None:
        """The end of the last token before what was found, where that may be drawn again."""
        assert self.rollback is not None
        found = []
        if step.cut is not None and "block" in self.rollback.on:
            found = [step.cut, *(finding.start for finding in step.findings if finding.action == "block")]
        found += [start for start, _ in step.hidden[:1] if "redact" in self.rollback.on]
        if not found or self.retries == 0:
            return None
        return max((end for end in self.ends if self.floor <= end <= min(found)), default=None)

    def _in_whole_tokens(self, step: Step) -> Step:
        """Keep what follows the last token that is decided whole. A replaced part cannot be gone back into."""
        self.clean += step.text
        released = self.session.released
        tail = released - max((end for end in self.ends if end <= released), default=released)
        tail = min(tail, len(self.clean))
        if step.cut is not None or any(end > released - tail for _, end in step.hidden):
            tail = 0
        keep = len(self.clean) - tail
        text, self.clean = self.clean[:keep], self.clean[keep:]
        self.floor = max(self.floor, released - tail)
        return step._replace(text=text, settled=step.settled if step.cut is not None else self.floor)

    def go_back(self, text: str) -> None:
        """Begin anew with the text that stays; what of it has left does not leave again."""
        self.session = self.guard.session(prompt=self.prompt, waits=False)
        self.clean, self.again, self.carried = "", self.shown, None
        self.carried = self._fresh(self.session.step(text))

    def _fresh(self, step: Step) -> Step:
        """A step without what left before the session was begun anew."""
        if self.carried is not None:
            step, self.carried = joined([self.carried, step]), None
        drop = min(self.again, len(step.text))
        self.again -= drop
        return step._replace(text=step.text[drop:]) if drop else step


def prepare(options: GuardOptions) -> None:
    """Compile an operator's policy, and load what its scanners need, before any request comes."""
    Guard.of(options)


def build_detour(options: GuardOptions, context: StageContext) -> Detour | None:
    if options.on_block.rollback is None or not Guard.of(options).has_output:
        return None
    detour: Detour = context.memory.setdefault("guard.detour", Detour())
    return detour


def build_prompt(options: GuardOptions, context: StageContext) -> PromptGuard | None:
    guard = Guard.of(options)
    return PromptGuard(guard, context) if guard.has_input or guard.has_output else None


def build_answer(options: GuardOptions, context: StageContext) -> AnswerGuard | None:
    guard = Guard.of(options)
    vault = context.memory.get("guard.vault")
    return AnswerGuard(guard, context) if guard.has_output or guard.has_input or vault else None
