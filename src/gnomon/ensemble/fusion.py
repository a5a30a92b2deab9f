"""Several distributions into one. Rows of log-probabilities over one vocabulary in, one row out.

`arithmetic`: sum w_i p_i. `geometric`: prod p_i ** w_i, renormalised. `contrastive` (arXiv 2210.15097): expert minus
amateur among the tokens that the expert finds plausible. `proxy` (arXiv 2401.08565): base + alpha (expert - anti).
Legend: m members, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.errors import UsageError

FUSIONS = ("arithmetic", "geometric", "contrastive", "proxy")
MEMBERS_NEEDED = {"contrastive": 2, "proxy": 3}


def fuse(logprobs: Sequence[Tensor], weights: Sequence[float], how: str, *, alpha: float, plausible: float) -> Tensor:
    """One row [V] of normalised log-probabilities; a member of weight 0 has no say.

    contrastive: members are (expert, amateur); alpha is the amateur's strength, plausible the share of the expert's
    best probability that a token must reach. proxy: members are (base, expert, anti-expert).
    """
    if how == "contrastive":
        expert, amateur = logprobs
        allowed = expert >= expert.max() + math.log(plausible)
        score = (1 + alpha) * expert - alpha * _finite(amateur)
        return torch.log_softmax(score.masked_fill(~allowed, -torch.inf), dim=-1)
    if how == "proxy":
        base, expert, anti = logprobs
        score = base + alpha * (_finite(expert) - _finite(anti))
        return torch.log_softmax(score, dim=-1)
    voting = [(w, row) for w, row in zip(weights, logprobs, strict=True) if w > 0]
    if len(voting) == 1:
        return voting[0][1]
    if how == "geometric":
        score = sum((w * row for w, row in voting[1:]), voting[0][0] * voting[0][1])
        if not bool(torch.isfinite(score).any()):
            raise UsageError("The members have no symbol in common: their geometric mean is empty.", param="fuse")
        return torch.log_softmax(score, dim=-1)
    total = torch.zeros_like(logprobs[0])
    for w, row in voting:
        total += w * torch.exp(row)
    return torch.log(total)


def _finite(row: Tensor) -> Tensor:
    """A row without -inf, so that differences stay numbers."""
    return row.clamp_min(-60.0)


def normalised(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to one. Raises UsageError for negative, non-finite, all-zero or miscounted ones."""
    if weights is None:
        return [1 / count] * count
    values = [float(w) for w in weights]
    if len(values) != count:
        raise UsageError(f"{len(values)} weights for {count} members.", hint="Give one each.", param="ensemble.weights")
    bad = next((w for w in values if not math.isfinite(w) or w < 0), None)
    if bad is not None:
        raise UsageError(f"A weight is {bad}; weights are 0 or above.", param="ensemble.weights")
    if sum(values) == 0:
        raise UsageError("All weights are 0: nobody would vote.", param="ensemble.weights")
    return [w / sum(values) for w in values]
