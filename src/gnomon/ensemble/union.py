"""The union of the members' vocabularies, in byte space, and what each member thinks of each symbol.

A token is its bytes; tokens of equal bytes (in one member or in several) are one symbol; every member's end tokens are
STOP. Other control tokens, padding rows and signs have no symbol: nobody can say them. Maps are index vectors, so a
step costs one gather per member. GaC (arXiv 2406.12585) does this with strings, which loses every byte above 0x7f.
Legend: V a member's vocabulary, S symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.ensemble.fusion import fuse
from gnomon.ensemble.member import Member
from gnomon.ensemble.options import Policy
from gnomon.ensemble.symbols import Symbols

BACKDROP = 100.0
"""How far below the candidates of topk everything else lies: reachable only where a mask leaves no candidate."""


@dataclass(frozen=True)
class SymbolMap:
    """One member's tokens as symbols.

    token_S: the member's token for each symbol, V where it has none. doubles: further tokens of a symbol that has one
    already (tokens, symbols). stops: tokens that mean STOP.
    """

    token_S: Tensor
    doubles: tuple[Tensor, Tensor]
    stops: Tensor

    @classmethod
    def of(cls, member: Member, symbols: Symbols) -> SymbolMap:
        size = member.tokenizer.vocab_size
        token_S = torch.full((symbols.size,), size, dtype=torch.int64)
        doubles: list[tuple[int, int]] = []
        for token, text in enumerate(member.retokenizer.texts):
            if not text or token in member.stops:
                continue
            symbol = symbols.index[text]
            if token_S[symbol] == size:
                token_S[symbol] = token
            else:
                doubles.append((token, symbol))
        pairs = torch.tensor(doubles, dtype=torch.int64).reshape(-1, 2)
        return cls(token_S, (pairs[:, 0], pairs[:, 1]), torch.tensor(sorted(member.stops), dtype=torch.int64))

    def row(self, logits_V: Tensor, *, renormalize: bool) -> Tensor:
        """A member's logits as logits over symbols [S]; -inf for what it cannot say.

        renormalize=False takes its share on symbols away first (GaC's arithmetic): the row then sums to less than one.
        """
        padded = torch.cat([logits_V, logits_V.new_full((1,), -torch.inf)])
        row_S = padded[self.token_S]
        tokens, places = self.doubles
        if len(tokens):
            row_S.index_put_((places,), torch.logaddexp(row_S[places], logits_V[tokens]))
        row_S[-3] = torch.logsumexp(logits_V[self.stops], dim=0)
        return row_S if renormalize else row_S - torch.logsumexp(logits_V, dim=0)


class UnionCore:
    """Fusion over the whole union, token by token."""

    def __init__(self, members: Sequence[Member], symbols: Symbols, *, renormalize: bool = True) -> None:
        self.members = list(members)
        self.symbols = symbols
        self.renormalize = renormalize
        self.maps = [SymbolMap.of(member, symbols) for member in members]

    @staticmethod
    def vocabulary(members: Sequence[Member]) -> Symbols:
        """Every member's strings, and all single bytes that some member can say."""
        return Symbols(text for member in members for text in member.retokenizer.texts)

    def rows(self, logits: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Per member its normalised log-probabilities over symbols [S]."""
        found: list[Tensor | None] = []
        for mapped, logits_V in zip(self.maps, logits, strict=True):
            if logits_V is None:
                found.append(None)
                continue
            row_S = mapped.row(logits_V, renormalize=self.renormalize)
            found.append(torch.log_softmax(row_S, dim=-1) if self.renormalize else row_S)
        return found

    def fused(self, rows: Sequence[Tensor], policy: Policy, weights: Sequence[float], *, masked: bool) -> Tensor:
        """One row [S] of log-probabilities."""
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

    def fused(self, rows: Sequence[Tensor], policy: Policy, weights: Sequence[float], *, masked: bool) -> Tensor:
        chosen = sorted({int(i) for row in rows for i in torch.topk(row, min(self.top, len(row))).indices})
        places = torch.tensor(chosen, dtype=torch.int64)
        narrow = [self._opinion(m, row, chosen) for m, row in enumerate(rows)]
        narrow = [torch.log_softmax(row, dim=-1) for row in narrow]
        best = fuse(narrow, weights, policy.fuse, alpha=policy.alpha, plausible=policy.plausible)
        row_S = (
            super().fused(rows, policy, weights, masked=masked) - BACKDROP
            if masked
            else torch.full_like(rows[0], -torch.inf)
        )
        row_S[places] = best
        return row_S

    def _opinion(self, place: int, row_S: Tensor, chosen: list[int]) -> Tensor:
        """What a member thinks of each candidate."""
        values = row_S[torch.tensor(chosen, dtype=torch.int64)].clone()
        taken = {symbol for symbol, value in zip(chosen, values.tolist(), strict=True) if value > -float("inf")}
        for index, symbol in enumerate(chosen):
            if symbol in taken or symbol >= self.symbols.stop or values[index] > -torch.inf:
                continue
            first = self._first_symbol(place, symbol)
            if first not in taken:
                taken.add(first)
                values[index] = row_S[first]
        return values

    def _first_symbol(self, place: int, symbol: int) -> int:
        """The symbol of the first token with which a member spells another symbol."""
        known = self._first[place]
        if symbol not in known:
            retokenizer = self.members[place].retokenizer
            known[symbol] = self.symbols.index[retokenizer.texts[retokenizer.ids(self.symbols.strings[symbol])[0]]]
        return known[symbol]
