"""String formats: which the mask engine knows, which we give as patterns, which are only checked afterwards.

Patterns are written from the RFCs' grammars, anchored, in the engine's dialect. A format that nobody defines
constrains nothing, and the report says so.
"""

from __future__ import annotations

OF_ENGINE = frozenset(["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"])
"""Formats that the mask engine enforces by itself."""

_PERCENT = "%[0-9A-Fa-f]{2}"
_PCHAR = rf"(?:[A-Za-z0-9._~!$&'()*+,;=:@-]|{_PERCENT})"
_TAIL = rf"(?:\?(?:{_PCHAR}|[/?])*)?(?:#(?:{_PCHAR}|[/?])*)?"
_POINTER = r"(?:/(?:[^~/]|~[01])*)*"

PATTERNS = {
    "uri-reference": rf"^(?:[A-Za-z][A-Za-z0-9+.-]*:)?(?://(?:[A-Za-z0-9._~!$&'()*+,;=:-]|{_PERCENT})*)?"
    rf"(?:/?{_PCHAR}+(?:/{_PCHAR}*)*|(?:/{_PCHAR}+)*/?)?{_TAIL}$",
    "json-pointer": rf"^{_POINTER}$",
    "relative-json-pointer": rf"^(?:0|[1-9][0-9]*)(?:#|{_POINTER})$",
    "uri-template": rf"^(?:[A-Za-z0-9._~!$&'()*+,;=:@/?#-]|{_PERCENT}|"
    r"\{[+#./;?&]?[A-Za-z0-9_]+(?:\*|:[1-9][0-9]{0,3})?(?:,[A-Za-z0-9_]+(?:\*|:[1-9][0-9]{0,3})?)*\})*$",
    "byte": r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
}
"""What the mask says for a format. The check afterwards has the last word."""

CHECKED = frozenset(["idn-email", "idn-hostname", "iri", "iri-reference", "regex"])
"""Formats that only the check afterwards knows."""


def known(name: object) -> bool:
    """Whether anything enforces this format."""
    return name in OF_ENGINE or name in PATTERNS or name in CHECKED


def pattern_of(name: object) -> str | None:
    return PATTERNS.get(name) if isinstance(name, str) else None
