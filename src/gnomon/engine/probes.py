"""Probes of the sampler: ties, extreme draws, and the recorded tokens of fixed logits and seeds.

Its arithmetic is float64 of our own, so what is recorded here holds on every machine.
Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from gnomon.engine import sampler
from gnomon.engine.philox import gumbel, uniform
from gnomon.engine.request import Request, SamplingParams

V = 300
SEEDS = range(8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"temperature": 0.8},
    "of the best five": {"temperature": 1.0, "top_k": 5},
    "of the nucleus": {"temperature": 1.3, "top_p": 0.6},
    "above a share of the best": {"temperature": 0.7, "min_p": 0.2},
}
RECORDED = {
    "plain": [260, 34, 219, 68, 260, 243, 51, 114],
    "of the best five": [34, 34, 49, 34, 241, 34, 177, 177],
    "of the nucleus": [193, 34, 219, 68, 260, 34, 215, 114],
    "above a share of the best": [260, 34, 219, 68, 260, 34, 215, 114],
}


def probe_sampler() -> Iterator[tuple[str, bool]]:
    """Comparisons for `kernels.probes.probe`."""
    tied_V = torch.zeros(V)
    tied_V[[42, 17, 250]] = 2.0
    yield "the lowest id of three equals", all(_drawn(tied_V, seed, temperature=0.0) == 17 for seed in SEEDS)
    few = [_drawn(torch.zeros(V), seed, temperature=1.0, top_k=4) for seed in SEEDS]
    yield "the first four of equals", set(few) <= {0, 1, 2, 3}
    extremes = uniform(np.array([0, 2**32 - 1], dtype=np.uint64))
    inside = bool((extremes > 0).all() and (extremes < 1).all())
    yield "the least and the greatest draw", inside and bool(np.isfinite(gumbel(extremes)).all())
    for name, options in OPTIONS.items():
        yield f"recorded tokens, {name}", [_drawn(_logits(), seed, **options) for seed in SEEDS] == RECORDED[name]


def _logits() -> torch.Tensor:
    """Fixed logits with many equals."""
    return torch.tensor([(7919 * token % 64) / 16 for token in range(V)])


def _drawn(logits_V: torch.Tensor, seed: int, **options: Any) -> int:
    request = Request("probe", [0], SamplingParams(seed=seed, max_tokens=1, **options))
    return sampler.RequestSampler(request, V).draw(logits_V.clone()).token_id
