"""llm-guard's Anonymize and Deanonymize over one vault, for Python; in a policy `{use: pii, action: vault}` does both.

vault = Vault()
get("anonymize", vault=vault).scan("Write to jane@example.org")  # ("Write to [EMAIL_1]", False, 1.0)
get("deanonymize", vault=vault).scan("", "Done: [EMAIL_1].")  # ("Done: jane@example.org.", True, -1.0)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from gnomon.errors import ConfigError
from gnomon.guard.scanning import Judgement, scanner
from gnomon.guard.vault import Vault


@lru_cache(maxsize=16)
def _guard(packs: tuple[str, ...]) -> Any:
    from gnomon.guard.guard import Guard

    return Guard({"input": [{"use": name, "action": "vault"} for name in packs]})


def given_vault(*, vault: Vault | None = None, **others: Any) -> Vault:
    """Raises ConfigError where there is none: options of a policy are plain values."""
    if not isinstance(vault, Vault):
        raise ConfigError(
            "`anonymize` and `deanonymize` need `vault=Vault()`, the same for both.",
            hint="In a policy: input: [{use: pii, action: vault}].",
            param="options.vault",
        )
    return vault


@scanner(
    "anonymize",
    about="Personal data into a `vault` (Python; in a policy: `pii` with the action `vault`).",
    directions=("input",),
    state="exact",
    needs=given_vault,
)
def anonymize(text: str, *, prompt: str = "", vault: Vault | None = None, packs: Sequence[str] = ("pii",)) -> Judgement:
    kept = given_vault(vault=vault)
    result = _guard(tuple(packs)).scan(text, "input", vault=kept)
    found = sorted({finding.rule for finding in result.findings})
    return Judgement(float(bool(found)), ", ".join(found), result.text)


@scanner(
    "deanonymize",
    about="Placeholders of a `vault` back to their values (Python; a policy does it by itself).",
    directions=("output",),
    state="exact",
    needs=given_vault,
)
def deanonymize(text: str, *, prompt: str = "", vault: Vault | None = None) -> Judgement:
    return Judgement(0.0, text=given_vault(vault=vault).restore(text))
