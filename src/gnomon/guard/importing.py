"""Reading other tools' rule files into packs of ours, with a list of what could only be taken in part, or not at all.

gitleaks.toml: regex, secretGroup, entropy, keywords (not needed: the automaton is linear), allowlist stopwords.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gnomon.errors import ConfigError, UsageError
from gnomon.guard.rules import make_rule


@dataclass(frozen=True)
class Imported:
    """pack: ready to be written as YAML. remarks: (rule, what was not taken as it is)."""

    pack: dict[str, Any]
    remarks: tuple[tuple[str, str], ...]


def gitleaks(path: Path) -> Imported:
    """A gitleaks.toml as a pack. Raises ConfigError when it is none."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as a gitleaks file: {error}.") from None
    given = content.get("rules")
    if not isinstance(given, list):
        raise ConfigError(f"{path} has no `rules`.")
    rules: list[dict[str, Any]] = []
    remarks: list[tuple[str, str]] = []
    for one in given:
        id, pattern = str(one.get("id", "?")), str(one.get("regex", ""))
        if not pattern:
            remarks.append((id, "skipped: no regex (it looks at file names)"))
            continue
        try:
            made = make_rule(id, pattern)
        except UsageError as error:
            remarks.append((id, f"skipped: {error.message}"))
            continue
        remarks += [(id, note) for note in made.notes]
        if one.get("secretGroup"):
            remarks.append((id, "secretGroup: with several groups the whole match counts"))
        row: dict[str, Any] = {"id": id, "regex": pattern}
        if one.get("description"):
            row["help"] = str(one["description"])
        if one.get("entropy"):
            row["entropy"] = float(one["entropy"])
        stopwords = [str(w) for allowed in _allowlists(one) for w in allowed.get("stopwords", [])]
        if stopwords:
            row["stopwords"] = stopwords
        if any(allowed.get("regexes") or allowed.get("paths") for allowed in _allowlists(one)):
            remarks.append((id, "allowlist patterns and paths are not taken"))
        rules.append(row)
    if not rules:
        raise ConfigError(f"{path}: none of its rules could be taken.")
    return Imported({"rules": rules}, tuple(remarks))


def _allowlists(rule: dict[str, Any]) -> list[dict[str, Any]]:
    found = [*rule.get("allowlists", []), *([rule["allowlist"]] if "allowlist" in rule else [])]
    return [one for one in found if isinstance(one, dict)]
