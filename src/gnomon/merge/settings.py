"""Parameter settings as mergekit writes them: a scalar, a gradient over the layers, or a list with name filters.

0.5                                        everywhere
[0, 0.5, 1]                                a gradient: interpolated over the layers
[{filter: mlp, value: 0.5}, {value: 1}]    the first entry whose filter is part of the tensor's name
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gnomon.errors import UsageError

MISSING = object()
Scalar = bool | int | float | str | None


@dataclass(frozen=True)
class Setting:
    """One parameter's setting at one level of the configuration."""

    entries: tuple[tuple[str | None, tuple[Scalar, ...] | Scalar], ...]

    @classmethod
    def parse(cls, value: Any, where: str) -> Setting:
        """Raises UsageError naming the key path."""
        if isinstance(value, Mapping):
            return cls((_entry(value, where),))
        if isinstance(value, Sequence) and not isinstance(value, str) and any(isinstance(v, Mapping) for v in value):
            return cls(tuple(_entry(entry, f"{where}[{i}]") for i, entry in enumerate(value)))
        return cls(((None, _value(value, where)),))

    def at(self, tensor: str, t: float) -> Any:
        """The value for a tensor at layer position t in 0..1; MISSING where no filter fits."""
        for pattern, value in self.entries:
            if pattern is None or pattern == "*" or pattern in tensor:
                return _interpolated(value, t) if isinstance(value, tuple) else value
        return MISSING


def _entry(entry: Any, where: str) -> tuple[str | None, tuple[Scalar, ...] | Scalar]:
    if not isinstance(entry, Mapping) or "value" not in entry:
        raise UsageError(f"{where}: each entry of a filtered list is {{filter: ..., value: ...}}.", param=where)
    if unknown := set(entry) - {"filter", "value"}:
        raise UsageError(f"{where}: unknown key `{sorted(unknown)[0]}` beside filter and value.", param=where)
    pattern = entry.get("filter")
    return (None if pattern is None else str(pattern)), _value(entry["value"], f"{where}.value")


def _value(value: Any, where: str) -> tuple[Scalar, ...] | Scalar:
    if isinstance(value, Sequence) and not isinstance(value, str):
        if not value or not all(isinstance(point, bool | int | float | str) for point in value):
            raise UsageError(f"{where}: a gradient is a list of at least one number.", param=where)
        return tuple(_number(point) for point in value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UsageError(f"{where}: {value!r} is no parameter value.", param=where)


def _number(point: Any) -> Any:
    """YAML reads 1e-5 as a string; in a gradient it is meant as a number."""
    if isinstance(point, str):
        try:
            return float(point)
        except ValueError:
            return point
    return point


def _interpolated(points: tuple[Any, ...], t: float) -> Any:
    place = t * (len(points) - 1)
    if any(isinstance(point, bool | str) for point in points):
        return points[int(place)]
    low = math.floor(place)
    high = min(len(points) - 1, low + 1)
    return (1 - (place - low)) * points[low] + (place - low) * points[high]
