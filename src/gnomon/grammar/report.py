"""The report on a grammar: what happens to every keyword, in plain words. Nothing is dropped without a line here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["enforced", "post-validated", "refused", "annotation"]


@dataclass(frozen=True)
class Entry:
    """One keyword at one path. enforced: by the mask, before a token is drawn. post-validated: when its value closes,
    with rollback. refused: an error. annotation: constrains nothing, by the standard or because nobody defines it."""

    path: str
    keyword: str
    status: Status
    note: str = ""


@dataclass(frozen=True)
class Report:
    """kind: schema, regex, lark, ... unsatisfiable: no text is accepted. route: how the mask grammar was made."""

    kind: str
    entries: tuple[Entry, ...] = ()
    draft: str = ""
    route: str = ""
    unsatisfiable: bool = False
    warnings: tuple[str, ...] = field(default=())

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def of(self, status: Status) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.status == status)

    @property
    def post_validated(self) -> tuple[Entry, ...]:
        return self.of("post-validated")

    @property
    def enforced(self) -> tuple[Entry, ...]:
        return self.of("enforced")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        counts = {status: len(self.of(status)) for status in ("enforced", "post-validated", "annotation", "refused")}
        return {**asdict(self), "entries": [asdict(entry) for entry in self.entries], "counts": counts}
