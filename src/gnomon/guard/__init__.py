"""guard: a stream of text is checked while it is produced; nothing flagged leaves, however the text is split.

guard = Guard()                       # secrets and personal data, redacted
session = guard.session()
session.push("my key is ghp_")        # -> "my key is "
guard.scan("a whole text").text
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gnomon.guard.finding import Finding, Result
    from gnomon.guard.guard import Guard
    from gnomon.guard.head import Head
    from gnomon.guard.policy import GuardOptions
    from gnomon.guard.rules import rule
    from gnomon.guard.scanning import Judgement, get, scanner
    from gnomon.guard.session import Session
    from gnomon.guard.vault import Vault

_WHERE = {
    "Finding": "finding",
    "Guard": "guard",
    "GuardOptions": "policy",
    "Result": "finding",
    "Session": "session",
    "Vault": "vault",
    "Judgement": "scanning",
    "Head": "head",
    "get": "scanning",
    "rule": "rules",
    "scanner": "scanning",
}
__all__ = [
    "Finding",
    "Guard",
    "GuardOptions",
    "Head",
    "Judgement",
    "Result",
    "Session",
    "Vault",
    "get",
    "rule",
    "scan",
    "scanner",
]


def scan(text: str | bytes, policy: Any = None) -> Result:
    """A whole text under a policy (default: secrets and personal data, redacted)."""
    from gnomon.guard.guard import Guard

    return Guard(policy).scan(text)


def __getattr__(name: str) -> Any:
    """Loaded when first used, so that `gnomon --help` imports no rules."""
    if name in _WHERE:
        return getattr(import_module(f"gnomon.guard.{_WHERE[name]}"), name)
    raise AttributeError(f"module `gnomon.guard` has no attribute `{name}`")
