"""Checks of parameters that are shares, and the rescaling after a random drop."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from gnomon.errors import UsageError

SMALLEST_NORM = 1e-7


def check_share(name: str, values: Sequence[float]) -> None:
    """Raises UsageError for a value outside 0..1."""
    for value in values:
        if not 0 <= value <= 1:
            raise UsageError(f"`{name}` must lie between 0 and 1, not {value}.", param=name)


def check_density(density: Sequence[float]) -> None:
    check_share("density", density)


def l1_scale(before: float, after: float, dtype: torch.dtype) -> float:
    """What brings the L1 norm back to what it was, rounded to the arithmetic's type; 1 where one is too small."""
    if before <= SMALLEST_NORM or after <= SMALLEST_NORM:
        return 1.0
    return float(torch.tensor(before, dtype=dtype) / torch.tensor(after, dtype=dtype))
