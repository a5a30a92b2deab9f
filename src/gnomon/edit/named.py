"""A table of things by name, one file each, options as pydantic models: edit methods and memory methods alike.

An entry's help is its docstring's first line. Files of the house and of third parties (an entry-point group) are
imported when the table is first asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from gnomon.errors import UnknownOption, UsageError
from gnomon.registry import nearest, option_error


@dataclass(frozen=True)
class Named:
    """What every entry has. experimental: shown to work as a mechanism only, not measured at full size."""

    name: str
    help: str
    paper: str
    options: type[BaseModel]
    experimental: bool

    def parse(self, given: Mapping[str, Any]) -> Any:
        """The options as their model. Raises UnknownOption with the nearest one, UsageError with the field at fault."""
        try:
            return self.options.model_validate(dict(given))
        except ValidationError as error:
            found = option_error(error)
            if isinstance(found, UnknownOption):
                raise UnknownOption(
                    f"`{self.name}` has no option `{found.param}`.",
                    hint=nearest(found.param or "", self.options.model_fields),
                    param=found.param,
                ) from None
            raise found from None


Entry = TypeVar("Entry", bound=Named)


class NamedTable(Generic[Entry]):
    """Entries by name. what: for errors. modules: the house's files. group: entry points of third parties."""

    def __init__(self, what: str, modules: Sequence[str], *, group: str, param: str) -> None:
        self.what, self.modules, self.group, self.param = what, modules, group, param
        self._entries: dict[str, Entry] = {}

    def add(self, entry: Entry) -> None:
        self._entries[entry.name] = entry

    def all(self) -> dict[str, Entry]:
        """Every entry, by name; imports their files."""
        for module in self.modules:
            importlib.import_module(module)
        for point in entry_points(group=self.group):
            point.load()
        return dict(sorted(self._entries.items()))

    def named(self, name: str) -> Entry:
        """Raises UsageError with the nearest name."""
        known = self.all()
        if name not in known:
            raise UsageError(f"There is no {self.what} `{name}`.", hint=nearest(name, known), param=self.param)
        return known[name]


def first_line(documented: Any) -> str:
    """Of its docstring."""
    text = (documented.__doc__ or "").strip().splitlines()
    return text[0] if text else ""
