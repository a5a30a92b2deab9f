"""What a long search has measured so far, in a file: begun again under the same name, it measures nothing twice.

The search itself is deterministic (its seed is part of its name), so it asks for the same candidates in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gnomon.merge.journal import journal_lines


class Remembered:
    """Losses by candidate. path None: only in memory. recalled: how many an earlier run left."""

    def __init__(self, path: Path | None, name: str) -> None:
        lines = journal_lines(path) if path is not None else []
        same = bool(lines) and lines[0].get("search") == name
        self._known = {str(line["candidate"]): float(line["loss"]) for line in lines[1:]} if same else {}
        self._path, self.recalled = path, len(self._known)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            kept = [{"search": name}, *({"candidate": c, "loss": loss} for c, loss in self._known.items())]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def knows(self, candidate: Mapping[str, Any]) -> bool:
        return key_of(candidate) in self._known

    def of(self, candidate: Mapping[str, Any], measure: Callable[[], float]) -> float:
        """The candidate's loss, measured where it is not known."""
        key = key_of(candidate)
        if key not in self._known:
            self._known[key] = measure()
            if self._path is not None:
                with self._path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"candidate": key, "loss": self._known[key]}) + "\n")
        return self._known[key]

    def forget(self) -> None:
        """The search is over."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)


def key_of(candidate: Mapping[str, Any]) -> str:
    """A candidate's name in the file."""
    return json.dumps(candidate, sort_keys=True)
