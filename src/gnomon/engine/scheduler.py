"""The scheduler: which tokens of which sequences are computed in the next step.

Continuous batching: decodes first, the rest of the token budget to prompts in chunks of any size (the kernels are
chunk-invariant, so there is no alignment to wait for), first come first served. What another sequence has computed of
the same text is shared: full pages by name, the page it still writes to as a copy, for each goes on otherwise. When
pages run out the youngest sequence is put back and recomputed later, which no output can show. A paused sequence is
passed over. Knows nothing of logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import takewhile

from gnomon.engine.pages import PagePool
from gnomon.engine.sequence import Sequence
from gnomon.kernels.batch import PAGE

Work = list[tuple[Sequence, int]]


class Scheduler:
    """waiting: not admitted (or put back), in order. running: holding pages.

    copy_page(source, target): the runner's; None where pages cannot be shared.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_sequences: int,
        token_budget: int,
        copy_page: Callable[[int, int], None] | None = None,
    ) -> None:
        self.pool = pool
        self.copy_page = copy_page
        self.max_sequences = max_sequences
        self.token_budget = token_budget
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.preemptions = 0
        self.cached_tokens = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)
        self.waiting.sort(key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, wherever it is, and free its pages."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        self._drop_pages(sequence)

    def schedule(self) -> Work:
        """The next step's work: (sequence, how many of its tokens). Empty when there is nothing to do."""
        budget = self.token_budget
        work: Work = []
        preempted = self.preemptions
        awake = [s for s in self.running if not s.paused]
        decoding = [s for s in awake if s.pending == 1]
        filling = [s for s in awake if s.pending > 1]
        for sequence in [*decoding, *filling]:
            if sequence in self.running and budget > 0:
                budget -= self._grant(sequence, budget, work)
        # Who was put back in this step is not admitted again in it: the pages it lacked are still in use.
        while budget > 0 and self.preemptions == preempted and (admitted := self._admit(budget)) is not None:
            budget -= self._grant(admitted, budget, work)
        return work

    def _grant(self, sequence: Sequence, budget: int, work: Work) -> int:
        """Give a sequence pages for its next tokens, putting back younger ones if need be -> tokens granted."""
        self._trim_drafts(sequence, budget)
        count = min(sequence.pending + len(sequence.drafts), budget)
        while not self._reserve(sequence, sequence.computed + count):
            youngest = max(self.running, key=lambda s: s.order)
            self._put_back(youngest)
            work[:] = [item for item in work if item[0] is not youngest]
            if youngest is sequence:
                return 0
        work.append((sequence, count))
        return count

    def _trim_drafts(self, sequence: Sequence, budget: int) -> None:
        """Drafts take what is left over: no budget and no page is taken from anybody for a guess."""
        spare = (len(sequence.pages) + self.pool.available) * PAGE - len(sequence.tokens)
        del sequence.drafts[max(0, min(budget - sequence.pending, spare)) :]

    def _reserve(self, sequence: Sequence, length: int) -> bool:
        """Pages for `length` tokens; False when the pool is exhausted (what was got is kept)."""
        while len(sequence.pages) * PAGE < length:
            page = self.pool.allocate()
            if page is None:
                return False
            sequence.pages.append(page)
        return True

    def _admit(self, budget: int) -> Sequence | None:
        """The next waiting sequence that fits, with what the prefix cache holds of it."""
        if len(self.running) >= self.max_sequences:
            return None
        in_flight = self._keys_in_flight()
        for sequence in self.waiting:
            if sequence.paused:
                continue
            if sequence.reads_cache and (self._first_missing(sequence) in in_flight or self._comes(sequence)):
                continue  # another sequence computes this very page now: wait for it and share
            needed = -(-min(len(sequence.tokens), sequence.computed + budget) // PAGE)
            if needed > self.pool.available and self.running:
                return None
            self.waiting.remove(sequence)
            self.running.append(sequence)
            self.running.sort(key=lambda s: s.order)
            self._read_cache(sequence)
            return sequence
        return None

    def _read_cache(self, sequence: Sequence) -> None:
        if not sequence.reads_cache:
            return
        usable = (len(sequence.tokens) - 1) // PAGE  # at least one token must be computed, to have logits
        sequence.pages = self.pool.find(sequence.keys[:usable], sequence.tokens)
        sequence.computed = len(sequence.pages) * PAGE
        self._copy_begun_page(sequence)
        if not sequence.sampler.generated:
            sequence.cached_tokens = sequence.computed
            self.cached_tokens += sequence.computed

    def _copy_begun_page(self, sequence: Sequence) -> None:
        """Copy-on-write: what another running sequence has of the page that this one is about to write to."""
        if self.copy_page is None:
            return
        start, place = sequence.computed, len(sequence.pages)
        wanted = sequence.tokens[start : min(start + PAGE, len(sequence.tokens) - 1)]
        most, source = 0, -1
        for other in self.running:
            if other.computed > start and _same_pages(other, sequence, place):
                there = zip(wanted, other.tokens[start : other.computed], strict=False)
                common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], there))
                if common > most:
                    most, source = common, other.pages[place]
        if most and (page := self.pool.allocate()) is not None:
            self.copy_page(source, page)
            sequence.pages.append(page)
            sequence.computed += most

    def _comes(self, sequence: Sequence) -> bool:
        """Whether a running sequence is still reading this very prompt, of which a part of a page will be copied."""
        if self.copy_page is None or (len(sequence.tokens) - 1) % PAGE == 0:
            return False
        prompt, salt = sequence.tokens, sequence.request.page_salt
        return any(
            other.pending > 1 and other.request.prompt_ids == prompt and other.request.page_salt == salt
            for other in self.running
            if other.computed < len(other.request.prompt_ids)
        )

    def _first_missing(self, sequence: Sequence) -> bytes | None:
        return next((key for key in sequence.keys if not self.pool.holds(key)), None)

    def _keys_in_flight(self) -> set[bytes]:
        """Names of pages that running sequences are filling."""
        filling: Iterable[Sequence] = (s for s in self.running if s.pending > 1)
        return {key for s in filling for key in s.keys[s.full_pages :]}

    def _put_back(self, sequence: Sequence) -> None:
        """Preempt by recompute: its noise depends on positions alone, so the same tokens come again."""
        self.preemptions += 1
        self.running.remove(sequence)
        self._drop_pages(sequence)
        sequence.prompt_logprobs.clear()
        self.add(sequence)

    def _drop_pages(self, sequence: Sequence) -> None:
        self.pool.release(sequence.pages)
        sequence.pages = []
        sequence.drafts = []
        sequence.computed = 0


def _same_pages(one: Sequence, other: Sequence, count: int) -> bool:
    """Whether the first `count` pages of two sequences hold the same text, computed with the same weights."""
    length = count * PAGE
    return one.request.page_salt == other.request.page_salt and one.tokens[:length] == other.tokens[:length]
