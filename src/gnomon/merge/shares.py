"""Checks of parameters that are shares, and the rescaling after a random drop."""

from __future__ import annotations

from collections.abc import Sequence

from gnomon.errors import UsageError

SMALLEST_NORM = 1e-7


def check_share(name: str, values: Sequence[float]) -> None:
    """Raises UsageError for a value outside 0..1."""
    for value in values:
        if not 0 <= value <= 1:
            raise UsageError(f"`{name}` must lie between 0 and 1, not {value}.", param=name)


def check_density(density: Sequence[float]) -> None:
    check_share("density", density)


def l1_scale(before: float, after: float) -> float:
    """What brings the L1 norm back to what it was; 1 where either is too small to divide."""
    return before / after if before > SMALLEST_NORM and after > SMALLEST_NORM else 1.0
