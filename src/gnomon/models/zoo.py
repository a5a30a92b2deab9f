"""The zoo: models known by name. One TOML file a model; adding a model is adding a file.

Knows what a model is made of and where its files come from; fetch.py gets them.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gnomon.errors import ConfigError

DEFAULT_MODEL = "smollm2-135m-instruct"


@dataclass(frozen=True)
class WheelMember:
    """One member of a wheel on the Python package index: package "name==version", member its path in the zip."""

    package: str
    member: str


@dataclass(frozen=True)
class ZooFile:
    """One file of a model: its parts joined in order."""

    name: str
    parts: tuple[WheelMember, ...]
    size: int
    sha256: str | None


@dataclass(frozen=True)
class ZooEntry:
    """One model. kind: "decoder" generates text, "encoder" embeds it. gated: the licence must be accepted first."""

    name: str
    summary: str
    licence: str
    files: tuple[ZooFile, ...]
    context: int
    kind: str = "decoder"
    gated: bool = False
    licence_url: str = ""

    @property
    def size(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def packages(self) -> list[str]:
        return list(dict.fromkeys(part.package for file in self.files for part in file.parts))


@cache
def zoo() -> Mapping[str, ZooEntry]:
    """All entries, by name."""
    folder = files("gnomon.models").joinpath("zoo")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".toml"))
    return {name[:-5]: _entry(name[:-5], tomllib.loads(folder.joinpath(name).read_text("utf-8"))) for name in names}


def _entry(name: str, content: dict[str, Any]) -> ZooEntry:
    try:
        members = tuple(_file(item) for item in content.pop("files"))
        return ZooEntry(name=name, files=members, **content)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"The zoo entry {name}.toml is wrong: {error}.") from None


def _file(item: dict[str, Any]) -> ZooFile:
    parts = item.get("parts") or [{"package": item["package"], "member": item["member"]}]
    wheels = tuple(WheelMember(part["package"], part["member"]) for part in parts)
    name = item.get("name") or wheels[0].member.rsplit("/", 1)[-1]
    return ZooFile(name, wheels, item["size"], item.get("sha256"))
