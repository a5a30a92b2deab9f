"""When to fuse, after SAFE (arXiv 2510.15346): the primary drafts, the others judge a whole draft in one pass each.

The answer is cut into windows of WINDOW symbols. In each the primary goes on greedily to the window's end; where it was
not sure, the other members read the draft in their own tokens. A place is fused when some member has a token boundary
there, is not of one mind with the primary on average, and would have said something else. Everywhere else the primary's
distribution stands. Whether a place is fused depends on the text before it alone: a draft that did not come true is
made anew to the same window's end. Fusing at every token is known to hurt long answers, and costs all forwards.
Legend: V a member's vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from gnomon.engine.runner import Rows
from gnomon.ensemble.draft import Draft, favourite
from gnomon.ensemble.member import Job
from gnomon.ensemble.runner import EnsembleRunner, UnionText
from gnomon.errors import GnomonError

WINDOW = 5
"""The paper's draft length."""


def window_end(start: int, begun: int) -> int:
    """Where the window ends that holds the symbol after `start` symbols, the first of which `begun` are prompt."""
    return begun + ((start - begun) // WINDOW + 1) * WINDOW


def rows_at(ends: Sequence[int], pieces: Sequence[bytes], before: int) -> tuple[int, list[int | None]]:
    """Which of a member's rows stand at some places of a text.

    ends: the places, bytes after the prompt. pieces: the member's own tokens after its prompt. before: rows of the
    prompt (only its last counts). Returns how many rows at the end are wanted, and per place its row among those or
    None where the member has no token boundary.
    """
    boundaries, length = {0: before}, 0
    for count, piece in enumerate(pieces, start=1):
        length += len(piece)
        boundaries[length] = before + count
    found = [boundaries.get(end) for end in ends]
    known = [row for row in found if row is not None]
    if not known:
        return 0, [None] * len(ends)
    first = min(known)
    return before + len(pieces) - first + 1, [None if row is None else row - first for row in found]


class SafeRunner(EnsembleRunner):
    """The union and topk cores, with `when: safe` beside the other policies."""

    def _rows(self, texts: Sequence[UnionText]) -> list[Rows]:
        drafting = [text for text in texts if self._drafts(text)]
        plain = [text for text in texts if not self._drafts(text)]
        failed: dict[int, GnomonError] = {}
        for text in drafting:
            if text.draft is None or not (text.draft.covers(text.symbols) or self._grows(text, text.draft)):
                text.draft = Draft(len(text.symbols), list(text.symbols))
        self._go_on([t for t in drafting if self._short(t)], failed)
        self._hear_judges([t for t in drafting if not self._short(t) and t.sequence not in failed], failed)
        rows = dict(zip((t.sequence for t in plain), super()._rows(plain), strict=True))
        for text in drafting:
            rows[text.sequence] = failed.get(text.sequence) or self._drafted_row(text)
        return [rows[text.sequence] for text in texts]

    def _drafts(self, text: UnionText) -> bool:
        return text.told.policy.when == "safe" and text.told.policy.primary not in text.told.dropped

    def _grows(self, text: UnionText, draft: Draft) -> bool:
        """Whether a draft that is not finished yet still goes on from this very text."""
        return not draft.judged and draft.base == text.symbols

    def _short(self, text: UnionText) -> bool:
        """Whether the primary has not come to the window's end yet."""
        assert text.draft is not None
        draft = text.draft
        ended = bool(draft.symbols) and draft.symbols[-1] == self.symbols.stop
        return not ended and draft.start + len(draft.symbols) < window_end(draft.start, text.begun)

    def _go_on(self, texts: Sequence[UnionText], failed: dict[int, GnomonError]) -> None:
        """One more symbol of each draft."""
        for m, member in enumerate(self.members):
            led = [text for text in texts if text.told.policy.primary == m]
            if not led:
                continue
            jobs = [self._draft_job(text, m)[0] for text in led]
            for text, result in zip(led, self._advance_member(member, jobs, self.token_budget), strict=True):
                assert text.draft is not None
                if isinstance(result, Tensor):
                    voice = self.core.voice(m, result)
                    text.draft.voices.append(voice)
                    text.draft.symbols.append(favourite(voice))
                elif isinstance(result, GnomonError):
                    self._failed(text, m, result, failed)

    def _hear_judges(self, texts: Sequence[UnionText], failed: dict[int, GnomonError]) -> None:
        """The others read finished drafts, where the primary was unsure."""
        for m, member in enumerate(self.members):
            asked: list[tuple[UnionText, list[int | None]]] = []
            jobs: list[Job] = []
            for text in texts:
                draft = text.draft
                assert draft is not None
                skip = m == text.told.policy.primary or m in text.told.dropped or text.sequence in failed
                if skip or draft.judged or m in draft.verdicts or not draft.unsure:
                    continue
                job, places = self._draft_job(text, m, draft.unsure)
                if job.rows == 0:
                    draft.verdicts[m] = [None] * len(draft.voices)
                    continue
                asked.append((text, places))
                jobs.append(job)
            results = self._advance_member(member, jobs, self.token_budget) if jobs else []
            for (text, places), result in zip(asked, results, strict=True):
                assert text.draft is not None
                if isinstance(result, Tensor):
                    rows = result.reshape(-1, result.shape[-1])
                    text.draft.verdicts[m] = [None if p is None else self.core.voice(m, rows[p]) for p in places]
                elif isinstance(result, GnomonError):
                    self._failed(text, m, result, failed)
        for text in texts:
            assert text.draft is not None
            judges = {m for m in range(len(self.members)) if m not in text.told.dropped} - {text.told.policy.primary}
            if not text.draft.judged and (not text.draft.unsure or judges <= text.draft.verdicts.keys()):
                text.draft.close()

    def _draft_job(self, text: UnionText, m: int, places: Sequence[int] = ()) -> tuple[Job, list[int | None]]:
        """A member's job on a draft, and per place of the draft which of its rows stands there (None: none is wanted
        or the member has no token boundary there).
        """
        draft = text.draft
        assert draft is not None and text.prompts is not None
        symbols = self.symbols
        ids = text.ids(m, symbols.text([*draft.base[text.begun :], *draft.symbols]))
        prompt = len(text.prompts[m])
        rows, found = 1, list[int | None]([None] * len(draft.voices))
        if places:
            ends = [len(symbols.text([*draft.base[text.begun :], *draft.symbols[:place]])) for place in places]
            texts = self.members[m].retokenizer.texts
            rows, known = rows_at(ends, [texts[i] for i in ids[prompt:]], prompt)
            by_place = dict(zip(places, known, strict=True))
            found = [by_place.get(place) for place in range(len(draft.voices))]
        return Job(text.sequence, ids, prompt, text.told.salt, text.told.counters[m], rows), found

    def _drafted_row(self, text: UnionText) -> Tensor | None:
        draft, told = text.draft, text.told
        if draft is None or not draft.judged or not draft.covers(text.symbols):
            return None
        place = len(text.symbols) - draft.start
        voices = {told.policy.primary: draft.voices[place]} | draft.heard[place]
        return self._told(text, dict(sorted(voices.items())))
