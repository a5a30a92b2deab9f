"""ECMA regular expressions as JSON Schema uses them -> the dialect of the mask engine, or None.

`\\d` and `\\w` are ASCII there and here; `$` means the very end. Look-around is worked out beforehand where it has an
automaton (`lookaround`); what is left is checked afterwards, with a bounded matcher. Knows nothing of schemas.
"""

from __future__ import annotations

import re

from gnomon.grammar.schema.lookaround import plain_expression

_LOOK_OR_BACK = re.compile(r"\(\?(?:=|!|<=|<!)|\\[1-9]|\\k<")
_CLASSES = {
    "d": "0-9",
    "w": "A-Za-z0-9_",
    "s": r" \t\n\r\x0b\x0c\x{a0}\x{feff}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}",
}
_ONCE = frozenset("dDwWsS")


def for_mask(pattern: object, *, whole: bool = False) -> str | None:
    """The pattern as the engine spells it; None when it has none. whole: it stands for texts from end to end."""
    if not isinstance(pattern, str):
        return None
    if _LOOK_OR_BACK.search(pattern):
        return plain_expression(pattern, whole=whole)
    try:
        return _translate(pattern)
    except (ValueError, IndexError):
        return plain_expression(pattern, whole=whole)


def escaped(text: str) -> str:
    """A text as a pattern of the engine's dialect that matches it alone."""
    return "".join(letter if letter.isalnum() else f"\\x{{{ord(letter):x}}}" for letter in text)


def whole(pattern: str) -> str | None:
    """An unanchored pattern of the engine's dialect as one that matches whole texts; None where it branches."""
    inner = re.sub(r"\\.|\[[^\]]*\]|\([^()]*\)", "", pattern)
    start, end = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    if "|" in inner or "(" in inner or "^" in inner[1:] or "$" in inner[:-1]:
        return None
    body = pattern[start : len(pattern) - end]
    return f"{'' if start else '(?s:.*)'}(?:{body}){'' if end else '(?s:.*)'}"


def _translate(pattern: str) -> str:
    out: list[str] = []
    place, in_class = 0, False
    while place < len(pattern):
        character = pattern[place]
        if character == "\\":
            taken, text = _escape(pattern, place, in_class)
            out.append(text)
            place += taken
            continue
        if in_class:
            if character == "]":
                in_class = False
            elif character in "[&~" or (character == "-" and pattern[place + 1 : place + 2] == "-"):
                character = "\\" + character
        elif character == "[":
            in_class = True
            if pattern[place + 1 : place + 2] == "]":
                raise ValueError("an empty class")
            if pattern[place + 1 : place + 3] == "^]":
                out.append("(?s:.)")
                in_class, place = False, place + 3
                continue
        elif pattern.startswith("(?<", place):
            out.append("(?P<")
            place += 3
            continue
        out.append(character)
        place += 1
    return "".join(out)


def _escape(pattern: str, place: int, in_class: bool) -> tuple[int, str]:
    """The escape at this place -> (characters taken, the engine's spelling)."""
    letter = pattern[place + 1]
    if letter in _ONCE:
        inside = _CLASSES[letter.lower()]
        if letter.islower():
            return 2, inside if in_class else f"[{inside}]"
        return 2, f"[^{inside}]"
    if letter == "u" and pattern[place + 2 : place + 3] == "{":
        end = pattern.index("}", place)
        return end + 1 - place, f"\\x{{{pattern[place + 3 : end]}}}"
    if letter == "u":
        digits = pattern[place + 2 : place + 6]
        code = int(digits, 16)
        if 0xD800 <= code < 0xDC00 and pattern[place + 6 : place + 8] == "\\u":
            low = int(pattern[place + 8 : place + 12], 16)
            return 12, f"\\x{{{0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00):x}}}"
        return 6, f"\\x{{{code:x}}}"
    if letter == "c":
        return 3, f"\\x{{{ord(pattern[place + 2].upper()) - 64:x}}}"
    if letter == "0":
        return 2, "\\x00"
    if letter == "b" and in_class:
        return 2, "\\x08"
    if letter in "bB":
        raise ValueError("a word boundary")
    if letter in "pP":
        end = pattern.index("}", place)
        name = pattern[place + 3 : end].split("=")[-1]
        return end + 1 - place, f"\\{letter}{{{name}}}"
    if letter in "/-'\"<>=!:,;#%&@`~ _" or (letter.isalpha() and letter not in "fnrtvx"):
        return 2, letter if letter.isalnum() or letter in " _'\"<>=!:,;%@`/" else f"\\{letter}"
    if letter == "v":
        return 2, "\\x0b"
    return 2, f"\\{letter}"
