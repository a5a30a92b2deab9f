"""One member's next-byte distribution, exactly: the sum over the token sequences that cover the text so far.

A cover is tokens that spell all of the text but its end, then one open token that begins with that end. Covers that
share their finished tokens are one node: a point in the token trie with a weight. A byte narrows every node; where a
token ends there, a new node begins, whose logits are asked for (`wanted`) before the next distribution is known.

`canonical`: a finished token sequence counts when it is the tokeniser's own for its bytes; what it drops is the mass
of spellings the model was never trained on. Otherwise all spellings count. `width` and `prune` bound how many nodes
live; dropped mass is summed in `pruned`. width=0 and prune=0 drop nothing. With everything kept this is the sum over
all covers (arXiv 2410.09303); the canonical restriction is arXiv 2506.14123's. The distribution is renormalised at each
byte, so it sums to one and a text's probability does not depend on how it is cut. What was dropped
(`asleep`) goes on as if every byte were equally likely, so that no byte is impossible for being rare. Knows no network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gnomon.ensemble.trie import ByteTrie, Floats, Masses

STOP = 256
LEAST = 1e-9
"""Of a distribution, kept for bytes that the float32 logits give no chance at all (unless prune is 0)."""


@dataclass(frozen=True)
class Node:
    """Covers with the same finished tokens. weight: relative to the text's probability. depth: bytes of the open token
    that are known; [low, high): the tokens it may still be.
    """

    tokens: tuple[int, ...]
    weight: float
    masses: Masses
    low: int
    high: int
    depth: int


@dataclass(frozen=True)
class Candidate:
    """Finished tokens whose logits are not known yet, and the known bytes of the open token after them."""

    tokens: tuple[int, ...]
    weight: float
    rest: bytes = b""


@dataclass
class Lattice:
    """tokenize: the tokeniser's own tokens for all bytes of this text (None: no telling, inside a character)."""

    trie: ByteTrie
    tokenize: Callable[[bytes], list[int]]
    canonical: bool = True
    width: int = 8
    prune: float = 1e-3
    text: bytes = b""
    nodes: list[Node] = field(default_factory=list)
    candidates: list[Candidate] = field(default_factory=lambda: [Candidate((), 1.0)])
    asleep: float = 0.0
    pruned: float = 0.0
    healed: int = 0

    def wanted(self) -> tuple[int, ...] | None:
        """Finished tokens after which logits are needed next; None when the distribution is known."""
        return self.candidates[0].tokens if self.candidates else None

    def give(self, logits: NDArray[np.float32]) -> None:
        """The logits after `wanted()`."""
        candidate = self.candidates.pop(0)
        masses = self.trie.masses(logits)
        low, high = self.trie.whole
        for depth, byte in enumerate(candidate.rest):
            low, high = self.trie.child(low, high, depth, byte)
        depth = len(candidate.rest)
        longer = self.trie.exact(low, high, depth)
        self.nodes.append(Node(candidate.tokens, candidate.weight, masses, longer, high, depth))
        if candidate.rest:  # the text was begun again here: its last token may be finished, too
            ended = float(masses.cumulative_V1[longer] - masses.cumulative_V1[low])
            alive = float(masses.cumulative_V1[high] - masses.cumulative_V1[low]) > 0
            self.candidates.append(
                Candidate(tuple(self.tokenize(self.text)), candidate.weight * ended if alive else 1.0)
            )

    def distribution(self) -> Floats:
        """Probabilities of the 256 next bytes and STOP -> [257]."""
        mass = np.zeros(257)
        for node in self.nodes:
            mass[:256] += node.weight * self.trie.next_bytes(node.masses, node.low, node.high, node.depth)
            if node.depth == 0:
                mass[STOP] += node.weight * node.masses.stop
        mass += max(self.asleep, LEAST if self.prune else 0.0) / len(mass)
        mass /= mass.sum()
        return mass

    def push(self, byte: int) -> None:
        """The text goes on with this byte."""
        self.text += bytes([byte])
        ended: dict[tuple[int, ...], float] = {}
        living: list[Node] = []
        for node in self.nodes:
            low, high = self.trie.child(node.low, node.high, node.depth, byte)
            depth = node.depth + 1
            longer = self.trie.exact(low, high, depth)
            cumulative = node.masses.cumulative_V1
            for place in range(low, longer):
                tokens = (*node.tokens, int(self.trie.ids_V[place]))
                weight = node.weight * float(cumulative[place + 1] - cumulative[place])
                ended[tokens] = ended.get(tokens, 0.0) + weight
            if longer < high:
                living.append(replace(node, low=longer, high=high, depth=depth))
        self._keep(living, self._admissible(ended))

    def _admissible(self, ended: dict[tuple[int, ...], float]) -> dict[tuple[int, ...], float]:
        """Without the spellings that are not the tokeniser's own; inside a character nobody can tell yet."""
        if not self.canonical or not ended or not whole_characters(self.text):
            return ended
        own = tuple(self.tokenize(self.text))
        return {tokens: weight for tokens, weight in ended.items() if tokens == own}

    def _keep(self, living: list[Node], ended: dict[tuple[int, ...], float]) -> None:
        """Drop what weighs too little, rescale the rest to a sum of one, begin again where nothing is left."""
        open_mass = [n.weight * float(n.masses.cumulative_V1[n.high] - n.masses.cumulative_V1[n.low]) for n in living]
        alive = sum(open_mass) + sum(ended.values())
        total = alive + self.asleep / 257
        if not alive > 0.0:
            self._heal()
            return
        shares = [*open_mass, *ended.values()]
        least = self.prune * total
        if self.width and len(shares) > self.width:
            least = max(least, sorted(shares)[-self.width])
        self.nodes = [replace(n, weight=n.weight / total) for n, m in zip(living, open_mass, strict=True) if m >= least]
        self.candidates = [Candidate(t, w / total) for t, w in ended.items() if w >= least]
        self.candidates.sort(key=lambda candidate: (-candidate.weight, candidate.tokens))
        self.pruned += sum(share for share in shares if share < least) / total
        self.asleep = (self.asleep / 257 + sum(share for share in shares if share < least)) / total

    def _heal(self) -> None:
        """No cover is left (dropped, or the model gave the text no chance): begin again before the last own token."""
        self.nodes, self.asleep = [], self.prune
        own = self.tokenize(self.text)
        before = own[:-1]
        rest = self.text[len(self.text) - len(self.trie.texts[own[-1]]) :]
        self.candidates = [Candidate(tuple(before), 1.0, rest)]
        self.healed += 1


def whole_characters(text: bytes) -> bool:
    """Whether the text does not end inside a UTF-8 character."""
    tail = text[-4:]
    for back, byte in enumerate(reversed(tail), start=1):
        if byte < 0x80:
            return True
        if byte >= 0xC0:
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return back >= length
    return True
