"""The union of the members' vocabularies, in byte space, and what each member thinks of each symbol.

A token is its bytes; tokens of equal bytes (in one member or in several) are one symbol; every member's end tokens are
STOP. Other control tokens, padding rows and signs have no symbol: nobody can say them. Maps are index vectors, so a
step costs one gather per member. GaC (arXiv 2406.12585) does this with strings, which loses every byte above 0x7f.
Arrays are numpy's: one thread, whose order of additions no number of threads changes. (A torch operation on two threads
also leaves a worker spinning on the core that the next network pass wants.)
Legend: V a member's vocabulary, S symbols.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gnomon.ensemble.fusion import fuse
from gnomon.ensemble.language import common_alphabet
from gnomon.ensemble.member import Member
from gnomon.ensemble.options import Policy
from gnomon.ensemble.symbols import Symbols

BACKDROP = 100.0
"""How far below the candidates of topk everything else lies: reachable only where a mask leaves no candidate."""
Row = NDArray[np.float32]
Places = NDArray[np.int64]


@dataclass(frozen=True)
class SymbolMap:
    """One member's tokens as symbols.

    token_S: the member's token for each symbol, V where it has none. doubles: further tokens of a symbol that has one
    already. stops: tokens that mean STOP. silent: tokens without a symbol. symbol_V: each token's symbol, -1 without.
    """

    token_S: Places
    symbol_V: Places
    doubles: Places
    stops: Places
    silent: Places
    stop: int

    @classmethod
    def of(cls, member: Member, symbols: Symbols) -> SymbolMap:
        size = member.tokenizer.vocab_size
        token_S = np.full(symbols.size, size, dtype=np.int64)
        symbol_V = np.full(size, -1, dtype=np.int64)
        doubles = []
        for token, text in enumerate(member.retokenizer.texts):
            if token in member.stops:
                symbol_V[token] = symbols.stop
            elif (symbol := symbols.index.get(text, -1)) >= 0:
                symbol_V[token] = symbol
                if token_S[symbol] == size:
                    token_S[symbol] = token
                else:
                    doubles.append(token)
        stops = np.array(sorted(member.stops), dtype=np.int64)
        return cls(token_S, symbol_V, np.array(doubles, np.int64), stops, np.flatnonzero(symbol_V < 0), symbols.stop)

    def voice(self, logits_V: Tensor, *, renormalize: bool) -> Voice:
        """renormalize=False: what the member gives to silent tokens is lost (GaC's arithmetic)."""
        logits = logits_V.numpy()
        if renormalize and len(self.silent):
            logits = logits.copy()
            logits[self.silent] = -np.inf
        probabilities = torch.softmax(torch.from_numpy(logits), dim=-1).numpy()
        best = int(logits.argmax())
        norm = np.float32(float(logits[best]) - math.log(float(probabilities[best])))
        return Voice(self, logits, probabilities, norm)


@dataclass(frozen=True)
class Voice:
    """What one member thinks, over its own tokens and so over symbols. Rows [S] are made only where they are needed.

    norm: what is taken from a logit to make it a log-probability.
    """

    mapped: SymbolMap
    logits_V: Row
    probabilities_V: Row
    norm: np.float32

    @property
    def best(self) -> float:
        """The greatest probability of a token."""
        return float(self.probabilities_V.max())

    @property
    def entropy(self) -> float:
        """In nats, of the distribution over tokens."""
        p = self.probabilities_V[self.probabilities_V > 0].astype(np.float64)
        return float(-(p * np.log(p)).sum())

    def at(self, symbols: Sequence[int]) -> list[float]:
        """Log-probabilities of some symbols, -inf for what it cannot say."""
        return [self._log(symbol) for symbol in symbols]

    def _log(self, symbol: int) -> float:
        mapped, logits_V = self.mapped, self.logits_V
        if symbol == mapped.stop:
            return float(np.logaddexp.reduce(logits_V[mapped.stops]) - self.norm)
        token = int(mapped.token_S[symbol])
        if token == len(logits_V):
            return -math.inf
        score = logits_V[token]
        for other in mapped.doubles[mapped.symbol_V[mapped.doubles] == symbol]:
            score = np.logaddexp(score, logits_V[other])
        return float(score - self.norm)

    def row(self) -> Tensor:
        """Log-probabilities of all symbols [S]."""
        mapped = self.mapped
        row_S = np.append(self.logits_V, np.float32(-np.inf))[mapped.token_S]
        np.logaddexp.at(row_S, mapped.symbol_V[mapped.doubles], self.logits_V[mapped.doubles])
        row_S[mapped.stop] = np.logaddexp.reduce(self.logits_V[mapped.stops])
        row_S -= self.norm
        return torch.from_numpy(row_S)

    def shares(self, scratch_V: Row, out_S: Row) -> Row:
        """Probabilities of all symbols, in `out_S`. scratch_V: room for a vocabulary and one."""
        size = len(self.probabilities_V)
        scratch_V[:size] = self.probabilities_V
        scratch_V[size] = 0.0
        np.take(scratch_V, self.mapped.token_S, out=out_S, mode="clip")
        if len(self.mapped.doubles):
            np.add.at(out_S, self.mapped.symbol_V[self.mapped.doubles], self.probabilities_V[self.mapped.doubles])
        out_S[self.mapped.stop] = self.probabilities_V[self.mapped.stops].sum()
        return out_S


class UnionCore:
    """Fusion over the whole union, token by token. Used by one thread at a time: its room for rows is its own."""

    def __init__(self, members: Sequence[Member], symbols: Symbols, *, renormalize: bool = True) -> None:
        self.members = list(members)
        self.symbols = symbols
        self.renormalize = renormalize
        self.maps = [SymbolMap.of(member, symbols) for member in members]
        self._scratch_V = np.empty(max(member.tokenizer.vocab_size for member in members) + 1, dtype=np.float32)
        self._scratch_S = np.empty(symbols.size, dtype=np.float32)

    @staticmethod
    def vocabulary(members: Sequence[Member]) -> Symbols:
        """Every member's strings that all members can spell, in their own tokens or byte by byte."""
        missing = frozenset(range(256)) - common_alphabet(members)
        texts = {text for member in members for text in member.retokenizer.texts}
        return Symbols(text for text in texts if missing.isdisjoint(text))

    def voice(self, member: int, logits_V: Tensor) -> Voice:
        """A member's opinion from its logits."""
        return self.maps[member].voice(logits_V, renormalize=self.renormalize)

    def fused(self, voices: dict[int, Voice], policy: Policy, weights: Sequence[float], *, masked: bool) -> Tensor:
        """One row [S] of log-probabilities. voices: by member. weights: of all members."""
        votes = {m: weights[m] for m in voices if weights[m] > 0}
        if policy.fuse != "arithmetic" or len(votes) < 2:
            return self._by_rows([v.row() for v in voices.values()], policy, [weights[m] for m in voices])
        total_S = np.zeros(self.symbols.size, dtype=np.float32)
        for m, weight in votes.items():
            share_S = voices[m].shares(self._scratch_V, self._scratch_S)
            share_S *= np.float32(weight)
            total_S += share_S
        with np.errstate(divide="ignore"):
            np.log(total_S, out=total_S)
        return torch.from_numpy(total_S)

    def _by_rows(self, rows: list[Tensor], policy: Policy, weights: Sequence[float]) -> Tensor:
        if len(rows) == 1:
            return rows[0]
        return fuse(rows, weights, policy.fuse, alpha=policy.alpha, plausible=policy.plausible)


class TopUnionCore(UnionCore):
    """UniTE (arXiv 2410.03777): only the union of each member's `top` best candidates is fused.

    A candidate that a member cannot say counts with the first token of its spelling; where two candidates begin with
    the same token, the first has it.
    """

    def __init__(self, members: Sequence[Member], symbols: Symbols, *, renormalize: bool = True, top: int = 10) -> None:
        super().__init__(members, symbols, renormalize=renormalize)
        self.top = top
        self._first: list[dict[int, int]] = [{} for _ in members]

    def fused(self, voices: dict[int, Voice], policy: Policy, weights: Sequence[float], *, masked: bool) -> Tensor:
        if len(voices) == 1:
            return super().fused(voices, policy, weights, masked=masked)
        chosen = sorted({symbol for m, voice in voices.items() for symbol in self._candidates(m, voice)})
        narrow = [torch.log_softmax(self._opinion(m, voice, chosen), dim=-1) for m, voice in voices.items()]
        best = self._by_rows(narrow, policy, [weights[m] for m in voices])
        if masked:
            row_S = super().fused(voices, policy, weights, masked=masked).numpy()
            row_S -= np.float32(BACKDROP)
        else:
            row_S = np.full(self.symbols.size, -np.inf, dtype=np.float32)
        row_S[chosen] = best.numpy()
        return torch.from_numpy(row_S)

    def _candidates(self, place: int, voice: Voice) -> list[int]:
        """The symbols of a member's best tokens."""
        mapped = self.maps[place]
        count = min(self.top + len(mapped.doubles) + len(mapped.stops), len(voice.logits_V))
        best = torch.topk(torch.from_numpy(voice.logits_V), count).indices.numpy()
        found = dict.fromkeys(int(s) for s in mapped.symbol_V[best] if s >= 0)
        ranked = sorted((-value, symbol) for symbol, value in zip(found, voice.at(list(found)), strict=True))
        return [symbol for value, symbol in ranked[: self.top] if value < math.inf]

    def _opinion(self, place: int, voice: Voice, chosen: list[int]) -> Tensor:
        """What a member thinks of each candidate."""
        values = voice.at(chosen)
        taken = {symbol for symbol, value in zip(chosen, values, strict=True) if value > -math.inf}
        for index, symbol in enumerate(chosen):
            if symbol in taken or symbol >= self.symbols.stop:
                continue
            first = self._first_symbol(place, symbol)
            if first not in taken:
                taken.add(first)
                (values[index],) = voice.at([first])
        return torch.tensor(values, dtype=torch.float32)

    def _first_symbol(self, place: int, symbol: int) -> int:
        """The symbol of the first token with which a member spells another symbol."""
        known = self._first[place]
        if symbol not in known:
            retokenizer = self.members[place].retokenizer
            known[symbol] = self.symbols.index[retokenizer.texts[retokenizer.ids(self.symbols.strings[symbol])[0]]]
        return known[symbol]
