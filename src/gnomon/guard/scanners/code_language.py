"""Code in certain languages, by the rules of the pack `code`. Not measured. Options: languages, is_blocked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from gnomon.errors import ConfigError
from gnomon.guard.scanning import Judgement, scanner

LANGUAGES = ("python", "javascript", "shell", "sql", "html")


@cache
def _guard() -> Any:
    from gnomon.guard.guard import Guard

    return Guard({"output": [{"use": "code", "leave_out": ["code-fence"], "action": "flag"}]})


def known(*, languages: Sequence[str] = LANGUAGES, **others: Any) -> None:
    """Raises ConfigError for a language whose code it cannot tell."""
    for name in languages:
        if name not in LANGUAGES:
            raise ConfigError(f"`code_language` does not know `{name}`.", hint=f"It knows: {', '.join(LANGUAGES)}.")


@scanner("code_language", about="Code in one of `languages`; with is_blocked: false in any other one.", needs=known)
def code_language(
    text: str, *, prompt: str = "", languages: Sequence[str] = LANGUAGES, is_blocked: bool = True
) -> Judgement:
    known(languages=languages)
    found = {finding.rule.removesuffix("-code") for finding in _guard().scan(text).findings}
    wrong = found & set(languages) if is_blocked else found - set(languages)
    return Judgement(float(bool(wrong)), ", ".join(sorted(wrong)))
