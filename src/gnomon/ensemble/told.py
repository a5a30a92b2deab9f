"""What a request tells the ensemble's runner, and what the runner notes of it: usage and votes.

One object per request travels down with every span and up again with tokens and the usage. Used on the engine's
thread alone once the request is submitted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from gnomon.ensemble.member import Counters
from gnomon.ensemble.options import Policy

Votes = Callable[[int], list[float | None]]


@dataclass
class Told:
    """policy: how to fuse. prompt_length: symbols of a raw prompt. prompts: the prompt in each member's own tokens.

    masked: whether stages may forbid symbols later. votes: set by the runner at each step, by the position of the
    symbol they are about: symbol -> log-probability per member, None for one that was not asked.
    """

    names: Sequence[str]
    policy: Policy
    prompt_length: int | None = None
    prompts: list[list[int]] | None = None
    salt: str = ""
    masked: bool = True
    trace: bool = False
    counters: list[Counters] = field(default_factory=list)
    steps: int = 0
    fused_steps: int = 0
    dropped: dict[int, str] = field(default_factory=dict)
    pruned: float = 0.0
    fused: bool = True
    votes: dict[int, Votes] = field(default_factory=dict)
    record: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counters = [Counters() for _ in self.names]

    def weights(self, speaking: Collection[int]) -> list[float]:
        """The policy's weights among those who speak; 0 for the others."""
        among = [w if place in speaking else 0.0 for place, w in enumerate(self.policy.weights)]
        total = sum(among)
        return [w / total for w in among] if total else [float(place in speaking) for place in range(len(among))]

    def token(self, symbol: int, position: int) -> dict[str, Any] | None:
        """A token was drawn: its votes, when they are wanted."""
        if not self.trace or position not in self.votes:
            return None
        votes = self.votes[position](symbol)
        shown = {
            name: None if vote is None or not math.isfinite(vote) else vote
            for name, vote in zip(self.names, votes, strict=True)
        }
        entry = {"fused": self.fused, "votes": shown}
        self.record.append({"symbol": symbol, **entry})
        return {"ensemble": entry}

    def usage(self) -> dict[str, Any]:
        """`usage.ensemble`."""
        used: dict[str, Any] = {
            "steps": self.steps,
            "fused_steps": self.fused_steps,
            "forwards": {n: c.forwards for n, c in zip(self.names, self.counters, strict=True)},
            "tokens": {n: c.tokens for n, c in zip(self.names, self.counters, strict=True)},
            "refed_tokens": {n: c.refed for n, c in zip(self.names, self.counters, strict=True)},
        }
        if self.pruned:
            used["pruned_mass"] = self.pruned
        if self.dropped:
            used["dropped"] = {self.names[place]: why for place, why in self.dropped.items()}
        return {"ensemble": used}
