"""What a mask costs: the share of the model's own probability that it keeps. Legend: V vocabulary."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def kept_mass(row_V: NDArray[np.float32], allowed_V: NDArray[np.bool_], temperature: float) -> float:
    """Probability of the allowed tokens, before the mask, at the sampler's temperature (1 for greedy), in 0..1."""
    greatest = row_V.max()
    if not np.isfinite(greatest):
        return 0.0
    scaled_V = row_V - greatest
    if temperature > 0:
        scaled_V /= np.float32(temperature)
    np.exp(scaled_V, out=scaled_V)
    total = float(scaled_V.sum(dtype=np.float64))
    kept = float(scaled_V[allowed_V].sum(dtype=np.float64))
    return min(kept / total, 1.0)
