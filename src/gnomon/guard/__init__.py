"""guard: a stream of text is checked while it is produced; nothing flagged leaves, however the text is split.

    guard = Guard()                       # secrets and personal data, redacted
    session = guard.session()
    session.push("my key is ghp_")        # -> "my key is "
    guard.scan("a whole text").text
"""

from gnomon.guard.finding import Finding, Result
from gnomon.guard.guard import Guard
from gnomon.guard.policy import GuardOptions
from gnomon.guard.session import Session
from gnomon.guard.vault import Vault

__all__ = ["Finding", "Guard", "GuardOptions", "Result", "Session", "Vault", "scan"]


def scan(text: str | bytes, policy: object = None) -> Result:
    """A whole text under a policy (default: secrets and personal data, redacted)."""
    return Guard(policy).scan(text)  # type: ignore[arg-type]
