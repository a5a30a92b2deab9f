"""EBNF as the W3C writes it (XML 1.0, section 6) -> Lark.

`Name ::= expression`, the first rule being the start; "text" and 'text' without escapes; `#xN`; `[a-z#xN]`, `[^a-z]`;
`A B`, `A | B`, `A - B` of character classes, `A? A* A+`, brackets, comments between `/*` and `*/`.
Knows the notation alone: what the grammar means, the mask engine says.
"""

from __future__ import annotations

import json
import re

from gnomon.errors import GrammarError

_TOKEN = re.compile(
    r"""(?P<space>\s+|/\*.*?\*/)
      | (?P<rule>[A-Za-z_][A-Za-z0-9_.-]*\s*::=)
      | (?P<name>[A-Za-z_][A-Za-z0-9_.]*(?:-[A-Za-z0-9_.]+)*)
      | (?P<text>"[^"]*"|'[^']*')
      | (?P<set>\[\^?[^\]]+\])
      | (?P<code>\#x[0-9A-Fa-f]+)
      | (?P<mark>[|()?*+-])""",
    re.VERBOSE | re.DOTALL,
)
_POINT = re.compile(r"#x([0-9A-Fa-f]+)|(.)", re.DOTALL)
MOST_DEPTH = 96


def ebnf_to_lark(text: str) -> str:
    """Raises GrammarError with the line."""
    return _Reader(text).lark()


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens: list[tuple[str, str, int]] = []
        place = 0
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                raise self._wrong(place, f"{text[place : place + 10]!r} is no EBNF")
            if found.lastgroup != "space":
                self.tokens.append((str(found.lastgroup), found.group(), place))
            place = found.end()
        self.at = 0
        self.depth = 0
        self.classes: list[str] = []
        self.names = [self._plain(value) for kind, value, _ in self.tokens if kind == "rule"]

    def lark(self) -> str:
        if not self.names:
            raise GrammarError("The EBNF grammar has no rule: `Name ::= expression`.", param="ebnf")
        lines = [f"start: {_rule(self.names[0])}"]
        defined: set[str] = set()
        while self.at < len(self.tokens):
            kind, value, place = self._take()
            if kind != "rule":
                raise self._wrong(place, f"{value!r} stands where a rule begins")
            name = self._plain(value)
            if name in defined:
                raise self._wrong(place, f"the rule {name!r} is there twice")
            defined.add(name)
            lines.append(f"{_rule(name)}: {self._either()}")
        return "\n".join([*lines, *self.classes]) + "\n"

    def _either(self) -> str:
        branches = [self._sequence()]
        while self._next("|"):
            branches.append(self._sequence())
        return " | ".join(branches)

    def _sequence(self) -> str:
        parts: list[str] = []
        while self._kind() not in ("", "rule") and self._value() not in ("|", ")"):
            place = self.tokens[self.at][2]
            part, is_class = self._repeated()
            if self._next("-"):
                less, also = self._repeated()
                if not (is_class and also):
                    raise self._wrong(place, "`A - B` is known between character classes alone")
                part = self._without(part, less)
            parts.append(part)
        return " ".join(parts) or '""'

    def _repeated(self) -> tuple[str, bool]:
        part, is_class = self._one()
        while self._kind() == "mark" and self._value() in ("?", "*", "+"):
            part, is_class = part + self._take()[1], False
        return part, is_class

    def _one(self) -> tuple[str, bool]:
        """(as Lark, whether it is one character)."""
        kind, value, place = self._take()
        if kind == "text":
            body = value[1:-1]
            return (json.dumps(body, ensure_ascii=False) if body else '""'), len(body) == 1
        if kind == "code":
            return f"/{_point(int(value[2:], 16))}/", True
        if kind == "set":
            return self._set(value), True
        if kind == "name":
            if value not in self.names:
                raise self._wrong(place, f"there is no rule {value!r}")
            return _rule(value), False
        if value == "(":
            self.depth += 1
            if self.depth > MOST_DEPTH:
                raise self._wrong(place, f"it is nested deeper than {MOST_DEPTH}")
            inner = self._either()
            if not self._next(")"):
                raise self._wrong(place, "this bracket is never closed")
            self.depth -= 1
            return f"({inner})", False
        raise self._wrong(place, f"{value!r} stands where something to match is due")

    def _set(self, value: str) -> str:
        negated = value.startswith("[^")
        body = value[1 + negated : -1]
        points = [int(code, 16) if code else ord(letter) for code, letter in _POINT.findall(body)]
        dashes = {n for n, (code, letter) in enumerate(_POINT.findall(body)) if not code and letter == "-"}
        out = ["-" if n in dashes and 0 < n < len(points) - 1 else _point(point) for n, point in enumerate(points)]
        return f"/[{'^' if negated else ''}{''.join(out)}]/"

    def _without(self, these: str, those: str) -> str:
        """The characters of one class that are none of another's, as a terminal of its own."""
        self.classes.append(f"CLASS{len(self.classes)}: {these} & ~{those}")
        return f"CLASS{len(self.classes) - 1}"

    def _take(self) -> tuple[str, str, int]:
        if self.at >= len(self.tokens):
            raise self._wrong(len(self.text), "it ends too soon")
        self.at += 1
        return self.tokens[self.at - 1]

    def _kind(self) -> str:
        return self.tokens[self.at][0] if self.at < len(self.tokens) else ""

    def _value(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) else ""

    def _next(self, mark: str) -> bool:
        found = self._kind() == "mark" and self._value() == mark
        self.at += found
        return found

    @staticmethod
    def _plain(value: str) -> str:
        return value.removesuffix("::=").strip()

    def _wrong(self, place: int, why: str) -> GrammarError:
        line = self.text.count("\n", 0, place) + 1
        return GrammarError(f"The EBNF grammar is wrong in line {line}: {why}.", param="ebnf")


def _rule(name: str) -> str:
    """A rule's name as Lark has them: small letters; nothing else is lost."""
    return "r_" + "".join(c if c.isdigit() or (c.islower() and c != "x") else f"x{ord(c):x}_" for c in name)


def _point(code: int) -> str:
    return f"\\x{{{code:x}}}"
