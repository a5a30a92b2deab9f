"""Banned words and competitors' names, in llm-guard's shape; in a policy `{use: words}` does it while streaming."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gnomon.errors import ConfigError
from gnomon.guard.scanning import Judgement, scanner

FORMS = r"(?:[ ,]{1,2}(?:inc|ltd|llc|plc|corp|co|gmbh|ag|sa|s\.a|bv|ab)\b\.?)?"
"""What may follow a company's name and belongs to it."""


@lru_cache(maxsize=64)
def _guard(policy: str) -> Any:
    from gnomon.guard.guard import Guard
    from gnomon.guard.policy import GuardOptions

    return Guard(GuardOptions.model_validate_json(policy))


def _judged(text: str, checks: list[dict[str, Any]], needed: int, redact: bool) -> Judgement:
    from gnomon.guard.policy import GuardOptions

    result = _guard(GuardOptions.model_validate({"output": checks}).model_dump_json()).scan(text)
    found = {finding.rule for finding in result.findings}
    certain = len(found) >= max(needed, 1)
    return Judgement(float(certain), f"{len(found)} of {len(checks)}", result.text if certain and redact else None)


def _given(name: str, values: Sequence[str]) -> None:
    if not values:
        raise ConfigError(f"`ban_{name}` needs `{name}`.", param=f"options.{name}")


def given_substrings(*, substrings: Sequence[str] = (), **others: Any) -> None:
    _given("substrings", substrings)


def given_competitors(*, competitors: Sequence[str] = (), **others: Any) -> None:
    _given("competitors", competitors)


@scanner(
    "ban_substrings",
    about="Any (or all) of `substrings`; `views` see through disguises.",
    state="exact",
    needs=given_substrings,
)
def ban_substrings(
    text: str,
    *,
    prompt: str = "",
    substrings: Sequence[str] = (),
    match: str = "str",
    contains_all: bool = False,
    redact: bool = False,
    views: Sequence[str] = ("raw",),
) -> Judgement:
    _given("substrings", substrings)
    checks = [
        {"use": "words", "name": f"s{place}", "words": [word], "match": match, "views": list(views)}
        | {"action": "replace", "replacement": "[REDACTED]"}
        for place, word in enumerate(substrings)
    ]
    return _judged(text, checks, len(substrings) if contains_all else 1, redact)


@scanner(
    "ban_competitors",
    about="Names of `competitors`, with or without their legal form.",
    state="exact",
    needs=given_competitors,
)
def ban_competitors(text: str, *, prompt: str = "", competitors: Sequence[str] = (), redact: bool = False) -> Judgement:
    _given("competitors", competitors)
    checks = [
        {"use": "regex", "name": f"c{place}", "regex": rf"(?i)\b{re.escape(name)}\b{FORMS}"}
        | {"action": "replace", "replacement": "[REDACTED]"}
        for place, name in enumerate(competitors)
    ]
    return _judged(text, checks, 1, redact)
