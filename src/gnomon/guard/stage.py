"""The guard in a generation: the prompt's texts before they become tokens, the answer's text before it leaves.

Joins the engine through the capability's two stages; what one prompt's stages share (its vault, what was found in the
prompt) lies in the context's memory. Knows nothing of tokens or HTTP.
"""

from __future__ import annotations

import time

from gnomon.capability import Released, StageContext
from gnomon.errors import Blocked
from gnomon.guard.finding import Finding
from gnomon.guard.guard import Guard
from gnomon.guard.meter import METER
from gnomon.guard.policy import GuardOptions
from gnomon.guard.vault import Restorer, Vault


class PromptGuard:
    """Checks each text of a prompt. A block refuses the prompt; what is redacted or vaulted never reaches the model."""

    def __init__(self, guard: Guard, context: StageContext) -> None:
        self.guard = guard
        self.memory = context.memory
        self.vault: Vault = self.memory.setdefault("guard.vault", Vault())
        self.findings: list[Finding] = self.memory.setdefault("guard.findings", [])

    def check(self, text: str) -> str:
        self.vault.reserve(text)
        self.memory["guard.prompt"] = text
        if self.guard.has_input:
            result = self.guard.scan(text, "input", vault=self.vault)
            self.findings += result.findings
            if result.verdict in ("block", "guard_error"):
                rules = sorted({finding.rule for finding in result.findings if finding.action == "block"})
                raise Blocked(f"The prompt was refused by the guard: {', '.join(rules)}.", param="messages")
            text = result.text
        if self.guard.has_output and self.guard.scan(text).findings:
            self.memory["private_prompt"] = True
        return text


class AnswerGuard:
    """One choice's answer: a session, then placeholders back to the user's own values."""

    def __init__(self, guard: Guard, context: StageContext) -> None:
        vault = context.memory.get("guard.vault")
        self.session = guard.session(prompt=context.memory.get("guard.prompt", ""), waits=False)
        self.waits = self.session.lookout is not None
        self.restorer = Restorer(vault) if vault is not None and len(vault) else None
        self.settled = 0
        self.prompt_findings: list[Finding] = list(context.memory.get("guard.findings", ()))

    def push(self, text: str) -> Released:
        begun = time.perf_counter()
        step = self.session.step(text)
        METER.piece(self.session.held, time.perf_counter() - begun)
        return self._released(step.text, step.settled, step.hidden, step.findings, step.cut)

    def finish(self) -> Released:
        step = self.session.close()
        return self._released(step.text, step.settled, step.hidden, step.findings, step.cut, last=True)

    def _released(
        self,
        text: str,
        settled: int,
        hidden: tuple[tuple[int, int], ...],
        findings: tuple[Finding, ...],
        cut: int | None,
        *,
        last: bool = False,
    ) -> Released:
        if self.restorer is not None:
            text = self.restorer.push(text) + (self.restorer.finish() if last or cut is not None else "")
        more, self.settled = max(settled - self.settled, 0), max(settled, self.settled)
        told = [{**finding.as_dict(), "where": "input"} for finding in self.prompt_findings]
        told += [finding.as_dict() for finding in findings]
        for finding in (*self.prompt_findings, *findings):
            METER.found(finding.rule, finding.action)
        self.prompt_findings = []
        return Released(text, more, cut, "content_filter", tuple(told), hidden)


def build_prompt(options: GuardOptions, context: StageContext) -> PromptGuard | None:
    guard = Guard.of(options)
    return PromptGuard(guard, context) if guard.has_input or guard.has_output else None


def build_answer(options: GuardOptions, context: StageContext) -> AnswerGuard | None:
    guard = Guard.of(options)
    vault = context.memory.get("guard.vault")
    return AnswerGuard(guard, context) if guard.has_output or guard.has_input or vault else None
