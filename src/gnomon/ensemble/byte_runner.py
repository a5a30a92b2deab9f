"""ByteRunner: members mixed byte by byte, as the engine's Runner. The symbols are the 256 bytes and STOP.

Each text has one lattice per member; a step pushes the new bytes and runs members only where a lattice asks for
logits. A raw prompt's last word is given to the lattices, not to the members as finished tokens, so that an answer may
go on in the middle of a token as likely as the model finds it (exact token healing).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from gnomon.engine.runner import Rows
from gnomon.ensemble.fusion import fuse
from gnomon.ensemble.language import common_alphabet
from gnomon.ensemble.lattice import Lattice
from gnomon.ensemble.member import Job, Member
from gnomon.ensemble.options import EnsembleOptions, Policy
from gnomon.ensemble.prompts import understand
from gnomon.ensemble.retokenize import GrowingText
from gnomon.ensemble.symbol_runner import SymbolRunner, SymbolText
from gnomon.ensemble.symbols import Symbols
from gnomon.ensemble.told import Told
from gnomon.ensemble.trie import ByteTrie, Floats
from gnomon.errors import GnomonError
from gnomon.kernels.batch import Span

MOST_HELD = 8
"""Tokens of a prompt's end that may be given to the lattice."""
BYTES_PER_TOKEN = 8
"""For the symbols' limit; the members' own limits are what counts."""


@dataclass
class ByteText(SymbolText):
    """held: the prompt's end, which the lattices see, by member."""

    held: list[bytes] = field(default_factory=list)
    lattices: list[Lattice] = field(default_factory=list)


class ByteRunner(SymbolRunner[ByteText]):
    """The byte core."""

    def __init__(
        self,
        members: Sequence[Member],
        policy: Policy,
        options: EnsembleOptions,
        *,
        token_budget: int = 256,
        max_sequences: int = 64,
    ) -> None:
        super().__init__(
            members,
            Symbols.of_bytes(),
            policy,
            max_context=BYTES_PER_TOKEN * min(member.max_context for member in members),
            token_budget=token_budget,
            max_sequences=max_sequences,
            on_failure=options.on_failure,
        )
        self.options = options
        common = common_alphabet(self.members)
        self.forbidden = [byte for byte in range(256) if byte not in common]
        self.tries = [ByteTrie(member.retokenizer.texts, member.stops) for member in members]

    def next_bytes(self, prefix: bytes) -> Floats:
        """[257] probabilities of what follows a raw text. To be called on the engine's thread, between steps."""
        sequence = -1
        try:
            row = self._row_now(self._hear(Span(sequence, list(prefix), 0, [])))
            return np.exp(row[:257].numpy().astype(np.float64))
        finally:
            self.release(sequence)

    # -- one text -----------------------------------------------------------------------------------------------

    def _new_text(self, sequence: int, told: Told) -> ByteText:
        return ByteText(sequence, told)

    def lattice(self, member: int) -> Lattice:
        """A fresh lattice of a member, before the first byte."""
        growing = GrowingText(self.members[member].retokenizer)
        o = self.options
        return Lattice(self.tries[member], growing.update, o.mode == "canonical", o.beam, o.prune)

    def _understand(self, text: ByteText) -> None:
        """The prompt in every member's tokens; lattices that have seen exactly the bytes after it, or fresh ones."""
        if text.prompts is None:
            prompt, text.begun = understand(self.symbols, text.symbols, text.told.prompt_length)
            whole = [member.prompt_ids(prompt) or member.start_ids() for member in self.members]
            raw = prompt.messages is None
            parts = [held_back(m, ids) if raw else (ids, b"") for m, ids in zip(self.members, whole, strict=True)]
            text.prompts, text.held = [ids for ids, _ in parts], [held for _, held in parts]
            text.lattices = []
        if not all(self._data(text, m).startswith(lattice.text) for m, lattice in enumerate(text.lattices)):
            text.lattices = []  # bytes were taken back
        if not text.lattices:
            text.lattices = [self.lattice(m) for m in range(len(self.members))]

    # -- all texts of a step ------------------------------------------------------------------------------------

    def _rows(self, texts: Sequence[ByteText]) -> list[Rows]:
        """Run the members until no lattice asks for more, or the step's budget is spent."""
        failed: dict[int, GnomonError] = {}
        spent = [0] * len(self.members)
        progress = True
        while progress:
            progress = False
            for m, member in enumerate(self.members):
                asking = [t for t in texts if t.sequence not in failed and m not in t.told.dropped and self._asks(t, m)]
                if asking and spent[m] < self.token_budget:
                    progress |= self._advance(member, m, asking, spent, failed)
        return [failed.get(t.sequence) or (self._fused(t) if self._complete(t) else None) for t in texts]

    def _data(self, text: ByteText, m: int) -> bytes:
        """All bytes a member's lattice is to see."""
        return text.held[m] + self.symbols.text(text.symbols[text.begun :])

    def _asks(self, text: ByteText, m: int) -> bool:
        """Push bytes as far as it goes without logits; whether logits are needed to go on."""
        lattice, data = text.lattices[m], self._data(text, m)
        while lattice.wanted() is None and len(lattice.text) < len(data):
            lattice.push(data[len(lattice.text)])
        return lattice.wanted() is not None

    def _complete(self, text: ByteText) -> bool:
        return all(
            lattice.wanted() is None and len(lattice.text) == len(self._data(text, m))
            for m, lattice in enumerate(text.lattices)
            if m not in text.told.dropped
        )

    def _advance(
        self, member: Member, m: int, texts: Sequence[ByteText], spent: list[int], failed: dict[int, GnomonError]
    ) -> bool:
        """One forward pass of a member for every text that asks. True when something came of it."""
        jobs = []
        for text in texts:
            assert text.prompts is not None
            prompt, wanted = text.prompts[m], text.lattices[m].wanted() or ()
            jobs.append(Job(text.sequence, [*prompt, *wanted], len(prompt), text.told.salt, text.told.counters[m]))
        before = sum(job.counters.tokens for job in jobs if job.counters is not None)
        results = self._advance_member(member, jobs, self.token_budget - spent[m])
        spent[m] += sum(job.counters.tokens for job in jobs if job.counters is not None) - before
        moved = False
        for text, result in zip(texts, results, strict=True):
            if isinstance(result, Tensor):
                text.lattices[m].give(result.numpy())
                moved = True
            elif isinstance(result, GnomonError):
                self._failed(text, m, result, failed)
                moved = True
        return moved

    def _fused(self, text: ByteText) -> Tensor:
        """[S] log-probabilities: bytes, STOP, and the two signs that nobody can say."""
        told, policy = text.told, text.told.policy
        speaking = [m for m in range(len(self.members)) if m not in told.dropped]
        rows = [as_row(text.lattices[m].distribution()) for m in speaking]
        weights = told.weights(speaking)
        told.steps += 1
        told.fused_steps += len(speaking) > 1
        told.pruned = max(lattice.pruned for lattice in text.lattices)
        votes = dict(zip(speaking, rows, strict=True))
        told.votes = {
            len(text.symbols): lambda symbol: [
                float(votes[m][symbol]) if m in votes else None for m in range(len(self.members))
            ]
        }
        how = {"alpha": policy.alpha, "plausible": policy.plausible}
        row = rows[0].clone() if len(rows) == 1 else fuse(rows, [weights[m] for m in speaking], policy.fuse, **how)
        if not self.forbidden or len(self.members) == 1:
            return row
        row[self.forbidden] = -torch.inf
        return torch.log_softmax(row, dim=-1)


def as_row(probabilities: Floats) -> Tensor:
    """[257] probabilities as a row of log-probabilities over the byte symbols."""
    with np.errstate(divide="ignore"):
        row = np.full(259, -np.inf, dtype=np.float32)
        row[:257] = np.log(probabilities)
    return torch.from_numpy(row)


def held_back(member: Member, ids: list[int]) -> tuple[list[int], bytes]:
    """A raw prompt's ids without its last word, and that word's bytes: from the last token that begins with a space
    or line break, or after a control token.
    """
    texts = member.retokenizer.texts
    for place in range(len(ids) - 1, max(len(ids) - 1 - MOST_HELD, 0), -1):
        if not texts[ids[place]]:
            return ids[: place + 1], b"".join(texts[i] for i in ids[place + 1 :])
        if texts[ids[place]][:1] in (b" ", b"\n"):
            break
    else:
        place = max(len(ids) - 1, 1)
    held = b"".join(texts[i] for i in ids[place:])
    if member.retokenizer.ids(held) != ids[place:]:
        return ids, b""
    return ids[:place], held
