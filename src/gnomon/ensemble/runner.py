"""EnsembleRunner: several members behind one virtual vocabulary, as the engine's Runner.

Spans of symbols in, rows over symbols out. The engine schedules, samples and cancels as with any model; per text the
members' own tokens follow by incremental re-tokenisation. What a text's row is depends on its symbols and its request's
policy alone, never on neighbours, chunks or what is cached.
Legend: S symbols, V a member's vocabulary, R rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from gnomon.engine.runner import Rows
from gnomon.ensemble.draft import Draft
from gnomon.ensemble.member import Job, Member
from gnomon.ensemble.options import Policy
from gnomon.ensemble.prompts import understand
from gnomon.ensemble.retokenize import GrowingText
from gnomon.ensemble.symbol_runner import SymbolRunner, SymbolText
from gnomon.ensemble.told import Told
from gnomon.ensemble.union import UnionCore, Voice
from gnomon.errors import GnomonError


@dataclass
class UnionText(SymbolText):
    """growing: each member's view of what was generated. voices: of the members that stand at its end. draft: where
    the primary would go on to (`when: safe`).
    """

    growing: list[GrowingText] = field(default_factory=list)
    voices: dict[int, Voice] = field(default_factory=dict)
    draft: Draft | None = None

    def ids(self, member: int, data: bytes) -> list[int]:
        assert self.prompts is not None
        return self.prompts[member] + self.growing[member].update(data)


@dataclass(frozen=True)
class Judged:
    """A symbol of a known text: the primary's best probability there, the symbol's log-probability alone and fused."""

    best: float
    alone: float
    fused: float


class EnsembleRunner(SymbolRunner[UnionText]):
    """The union and topk cores."""

    def __init__(
        self,
        members: Sequence[Member],
        core: UnionCore,
        policy: Policy,
        *,
        token_budget: int = 256,
        max_sequences: int = 64,
        on_failure: str = "fail",
    ) -> None:
        super().__init__(
            members,
            core.symbols,
            policy,
            max_context=min(member.max_context for member in members),
            token_budget=token_budget,
            max_sequences=max_sequences,
            on_failure=on_failure,
        )
        self.core = core

    def _new_text(self, sequence: int, told: Told) -> UnionText:
        return UnionText(sequence, told, growing=self._growing())

    def _growing(self) -> list[GrowingText]:
        return [GrowingText(member.retokenizer) for member in self.members]

    def _changed(self, text: UnionText) -> None:
        text.voices.clear()

    def _understand(self, text: UnionText) -> None:
        """The prompt in every member's tokens, once it is known whole."""
        if text.prompts is not None:
            return
        prompt, text.begun = understand(self.symbols, text.symbols, text.told.prompt_length)
        text.prompts = text.told.prompts or [member.prompt_ids(prompt) or member.start_ids() for member in self.members]

    def judge(self, prompt: Sequence[int], texts: Sequence[Sequence[int]]) -> list[list[Judged]]:
        """What a gate would see at every symbol of some continuations of a prompt: all members are asked everywhere.

        To be called on the engine's thread, between steps.
        """
        names = [member.name for member in self.members]
        policy = replace(self.policy, when="every")
        made = [
            UnionText(-2 - place, Told(names, policy, len(prompt)), list(prompt), growing=self._growing())
            for place in range(len(texts))
        ]
        found: list[list[Judged]] = [[] for _ in texts]
        try:
            while asked := [p for p, symbols in enumerate(texts) if len(found[p]) < len(symbols)]:
                for place in asked:
                    made[place].symbols = [*prompt, *texts[place][: len(found[place])]]
                    self._understand(made[place])
                for place, row in zip(asked, self._rows([made[p] for p in asked]), strict=True):
                    if isinstance(row, Tensor):
                        symbol = texts[place][len(found[place])]
                        leader = made[place].voices[policy.primary]
                        found[place].append(Judged(leader.best, leader.at([symbol])[0], float(row[symbol])))
                        made[place].voices.clear()
                    elif row is not None:
                        raise row
        finally:
            for text in made:
                self.release(text.sequence)
        return found

    # -- all texts of a step ------------------------------------------------------------------------------------

    def _rows(self, texts: Sequence[UnionText]) -> list[Rows]:
        failed: dict[int, GnomonError] = {}
        first = [(t, m) for t in texts for m in self._asked_first(t)]
        self._advance(first, failed)
        later = [(t, m) for t in texts if t.sequence not in failed for m in self._asked_later(t)]
        self._advance(later, failed)
        return [failed.get(text.sequence) or self._fused(text) for text in texts]

    def _asked_first(self, text: UnionText) -> list[int]:
        alive = [m for m in range(len(self.members)) if m not in text.told.dropped]
        policy = text.told.policy
        if policy.when == "every" or policy.primary not in alive:
            return [m for m in alive if policy.weights[m] > 0 or policy.fuse in ("contrastive", "proxy")]
        return [policy.primary]

    def _asked_later(self, text: UnionText) -> list[int]:
        """The others, where the primary's gate opens."""
        policy, told = text.told.policy, text.told
        if policy.when == "every" or policy.primary in told.dropped or policy.primary not in text.voices:
            return []
        if not self._gate_opens(text):
            return []
        return [m for m in range(len(self.members)) if m != policy.primary and m not in told.dropped]

    def _gate_opens(self, text: UnionText) -> bool:
        """Whether the primary is unsure enough to ask the others."""
        policy, leader = text.told.policy, text.voices[text.told.policy.primary]
        return leader.best < policy.threshold if policy.when == "gate" else leader.entropy > policy.threshold

    def _advance(self, asked: Sequence[tuple[UnionText, int]], failed: dict[int, GnomonError]) -> None:
        """Bring members up to date with texts; what they say stands in text.voices afterwards."""
        for m, member in enumerate(self.members):
            texts = [text for text, who in asked if who == m and m not in text.voices and text.sequence not in failed]
            jobs = []
            for text in texts:
                data = self.symbols.text(text.symbols[text.begun :])
                assert text.prompts is not None
                prompt = len(text.prompts[m])
                jobs.append(Job(text.sequence, text.ids(m, data), prompt, text.told.salt, text.told.counters[m]))
            if not jobs:
                continue
            results = self._advance_member(member, jobs, self.token_budget)
            for text, result in zip(texts, results, strict=True):
                if isinstance(result, Tensor):
                    text.voices[m] = self.core.voice(m, result)
                elif isinstance(result, GnomonError):
                    self._failed(text, m, result, failed)

    def _fused(self, text: UnionText) -> Tensor | None:
        told, policy = text.told, text.told.policy
        alone = policy.when != "every" and policy.primary not in told.dropped
        wanted = set(self._asked_first(text))
        if alone and policy.primary in text.voices and self._gate_opens(text):
            wanted |= {m for m in range(len(self.members)) if m not in told.dropped}
        if not wanted <= text.voices.keys():
            return None
        return self._told(text, {m: text.voices[m] for m in sorted(wanted)})

    def _told(self, text: UnionText, voices: dict[int, Voice]) -> Tensor:
        """The fused row of those who speak; usage and votes are noted."""
        told = text.told
        fused = self.core.fused(voices, told.policy, told.weights(voices), masked=told.masked)
        told.steps += 1
        told.fused_steps += len(voices) > 1
        told.fused = len(voices) > 1
        told.votes = {
            len(text.symbols): lambda symbol: [
                voices[m].at([symbol])[0] if m in voices else None for m in range(len(self.members))
            ]
        }
        return fused
