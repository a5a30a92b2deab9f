"""Table: rows of named numbers, to print, to save and to compare. Knows nothing of what they mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Table:
    """rows: mappings with the same kind of keys; a column that a row lacks is empty there."""

    rows: tuple[Mapping[str, Any], ...]
    details: tuple[Mapping[str, Any], ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, **equal: Any) -> Mapping[str, Any]:
        """The first row whose cells are equal to these. Raises KeyError."""
        for row in self.rows:
            if all(row.get(key) == value for key, value in equal.items()):
                return row
        raise KeyError(f"no row with {equal}")

    def cells(self) -> list[list[str]]:
        return [[shown(row.get(column)) for column in self.columns] for row in self.rows]

    def __str__(self) -> str:
        """Aligned plain text."""
        lines = [self.columns, *self.cells()]
        widths = [max(len(line[i]) for line in lines) for i in range(len(self.columns))]
        return "\n".join(
            "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines
        )

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.cells()]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def __add__(self, other: Table) -> Table:
        return Table(self.rows + other.rows, self.details + other.details)


def table(rows: Sequence[Mapping[str, Any]], details: Sequence[Mapping[str, Any]] = ()) -> Table:
    return Table(tuple(rows), tuple(details))


def shown(value: Any) -> str:
    """A cell: shares as percentages with one digit, nothing as a dash."""
    if value is None or value != value:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{100 * value:.1f}%" if 0 <= value <= 1 else f"{value:.4g}"
    return str(value)
