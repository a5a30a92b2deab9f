"""Do members have a language in common? Its alphabet: the bytes that every member can say one by one.

A text over the common alphabet can be followed by every member, however it is tokenised; a text with other bytes makes
some member fall silent in the middle. So members need a common end of texts, and an alphabet that all of them share.
"""

from __future__ import annotations

from collections.abc import Sequence

from gnomon.ensemble.member import Member
from gnomon.errors import UnsupportedModel

NEVER_IN_UTF8 = frozenset({0xC0, 0xC1, *range(0xF5, 0x100)})
WHOLE = frozenset(range(256)) - NEVER_IN_UTF8


def alphabet(member: Member) -> frozenset[int]:
    """The bytes that a member has a token for."""
    return frozenset(member.retokenizer.byte_tokens)


def common_alphabet(members: Sequence[Member]) -> frozenset[int]:
    """The bytes that all members have a token for."""
    return frozenset.intersection(*(alphabet(member) for member in members))


def check_language(members: Sequence[Member]) -> None:
    """Raises UnsupportedModel where members share no stop symbol or no alphabet."""
    for member in members:
        if not member.stops:
            raise UnsupportedModel(
                f"The member `{member.name}` has no token that ends a text, so the members share no stop symbol.",
                hint="Its generation_config.json should name eos_token_id.",
            )
    if not common_alphabet(members):
        sizes = ", ".join(f"`{member.name}` {shown(alphabet(member))}" for member in members)
        raise UnsupportedModel(
            f"The members have no language in common: there is no byte that each of them can say ({sizes}).",
            hint="Members need tokens for single bytes, as byte-level and byte-fallback vocabularies have.",
        )


def shown(letters: frozenset[int]) -> str:
    """An alphabet in few words."""
    if not letters:
        return "has no tokens for single bytes"
    some = "".join(chr(b) if 0x20 < b < 0x7F else f"\\x{b:02x}" for b in sorted(letters)[:8])
    return f"says {some}" + (f" and {len(letters) - 8} more" if len(letters) > 8 else "")
