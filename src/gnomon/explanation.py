"""Why each token of a run is there: the run is made again with everything reported, and read token by token.

Nothing is stored for it: a replay has the same bits, so what the model thought, what a grammar allowed, how an
ensemble's members voted and what a guard found come out again. Knows the ledger's runs and a Model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gnomon.generation import Generation, Run, TokenLogprob
from gnomon.ledger import Replay, regenerate

if TYPE_CHECKING:
    from gnomon.model import Model


@dataclass(frozen=True)
class Step:
    """One token. probability: the model's own, before penalties, bias, masks and temperature.

    favourite: the model's likeliest token and its probability, when another was taken. why: "favourite" | "forced"
    (the grammar left one token) | "masked" (it left no favourite) | "closed" (it ended the text in time) | "drawn"
    (by chance) | "shifted" (by a penalty or a bias). kept_mass: what the grammar left of the distribution. runner: what
    an ensemble says of it: its members' votes.
    """

    token_id: int
    text: str
    probability: float
    favourite: tuple[str, float] | None
    why: str
    kept_mass: float | None = None
    runner: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Explanation:
    """One choice: whether it came again bit for bit, and its tokens. generation: None where it could not be made."""

    replay: Replay
    generation: Generation | None
    steps: list[Step]

    @property
    def run(self) -> Run:
        return self.replay.run


def explain(runs: list[Run], model: Model) -> list[Explanation]:
    """The choices of one generation, explained."""
    found = regenerate(runs, model, report=True)
    chance = "drawn" if runs[0].options.get("temperature") else "shifted"
    return [Explanation(replay, made, _steps(made, chance) if made else []) for replay, made in found]


def _steps(made: Generation, chance: str) -> list[Step]:
    """chance: why a token that is not the model's favourite was taken, when no grammar made it so."""
    tokens, trace = made.logprobs or [], made.trace
    kinds: list[str | None] = [None] * len(tokens)
    masses: list[float | None] = [None] * len(tokens)
    # The trace may have the end token beside the text's; where a guard hid tokens, places no longer agree.
    if trace is not None and len(trace.kinds) - len(tokens) in (0, 1):
        kinds, masses = list(trace.kinds[: len(tokens)]), list(trace.kept_mass[: len(tokens)])
    return [_step(token, kind, mass, chance) for token, kind, mass in zip(tokens, kinds, masses, strict=True)]


def _step(token: TokenLogprob, kind: str | None, mass: float | None, chance: str) -> Step:
    best = max(token.top, key=_p, default=token)
    taken = best.token_id == token.token_id or _p(best) <= _p(token)
    if kind in ("forced", "masked", "closed"):
        why = kind
    else:
        why = "favourite" if taken else chance
    favourite = None if taken else (best.text, _p(best))
    return Step(token.token_id, token.text, _p(token), favourite, why, mass, token.trace)


def _p(token: TokenLogprob) -> float:
    return math.exp(token.logprob) if token.logprob is not None else 0.0
