"""Patterns: RE2's syntax (no back-references, no general look-around) parsed into a small tree.

Beyond RE2, look-around of ONE character class is taken, `(?<![\\w-])` and `(?=[\\s;]|$)`, because it needs only the
neighbouring character. Greedy and lazy mean the same here: every match is considered. Knows nothing of automata.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from gnomon.errors import UsageError
from gnomon.guard import charset as cs
from gnomon.guard.charset import CharSet

MOST_REPEATS = 1000
MOST_DEPTH = 100


class PatternError(UsageError):
    """A pattern that is wrong, or asks for what a linear-time matcher cannot do; says at which character."""

    code = "invalid_pattern"

    def __init__(self, pattern: str, place: int, what: str) -> None:
        shown = pattern if len(pattern) <= 80 else pattern[:77] + "..."
        super().__init__(f"Pattern `{shown}`: {what} at character {place}.")
        self.place = place


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    chars: CharSet


@dataclass(frozen=True)
class Cat:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Alt:
    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """low to high times; high None: any number."""

    node: Node
    low: int
    high: int | None


@dataclass(frozen=True)
class Look:
    """True between two characters. where: "behind" or "ahead"; edge: whether the text's begin (end) makes it true."""

    where: str
    chars: CharSet
    edge: bool


@dataclass(frozen=True)
class Boundary:
    """\\b, or \\B when negated (ASCII words, as in RE2)."""

    negated: bool


@dataclass(frozen=True)
class Group:
    """A capture: marks the sensitive part of a rule."""

    node: Node
    name: str | None = None


Node = Chars | Cat | Alt | Repeat | Look | Boundary | Group
EMPTY = Cat(())


@dataclass(frozen=True)
class Flags:
    ignore_case: bool = False
    dot_all: bool = False
    multi_line: bool = False


def parse(pattern: str, *, ignore_case: bool = False) -> Node:
    """The pattern's tree. Raises PatternError."""
    parser = _Parser(pattern)
    node = parser.alternatives(Flags(ignore_case=ignore_case), 0)
    if parser.at < len(pattern):
        raise parser.error("unmatched `)`")
    return node


class _Parser:
    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.at = 0

    def error(self, what: str, place: int | None = None) -> PatternError:
        return PatternError(self.pattern, self.at if place is None else place, what)

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, text: str) -> bool:
        if self.peek(text):
            self.at += len(text)
            return True
        return False

    def next(self) -> str:
        if self.at >= len(self.pattern):
            raise self.error("the pattern ends too early")
        self.at += 1
        return self.pattern[self.at - 1]

    # -- structure ----------------------------------------------------------------------------------------------

    def alternatives(self, flags: Flags, depth: int) -> Node:
        if depth > MOST_DEPTH:
            raise self.error("nested too deep")
        options: list[Node] = []
        parts: list[Node] = []
        while self.at < len(self.pattern) and not self.peek(")"):
            if self.take("|"):
                options.append(_cat(parts))
                parts = []
            elif (changed := self.inline_flags(flags)) is not None:
                flags = changed
            else:
                parts.append(self.repeated(flags, depth))
        options.append(_cat(parts))
        return options[0] if len(options) == 1 else Alt(tuple(options))

    def inline_flags(self, flags: Flags) -> Flags | None:
        """`(?i)` for the rest of the group; None when something else stands here."""
        begin = self.at
        if not self.peek("(?") or self.pattern[self.at + 2 : self.at + 3] not in "imsU-":
            return None
        end = self.pattern.find(")", begin)
        colon = self.pattern.find(":", begin)
        if end < 0 or 0 <= colon < end:
            return None
        self.at = begin + 2
        return self.flags_up_to(")", flags)

    def flags_up_to(self, stop: str, flags: Flags) -> Flags:
        value = True
        while not self.take(stop):
            letter = self.next()
            if letter == "-":
                value = False
            elif letter == "i":
                flags = replace(flags, ignore_case=value)
            elif letter == "s":
                flags = replace(flags, dot_all=value)
            elif letter == "m":
                flags = replace(flags, multi_line=value)
            elif letter != "U":
                raise self.error(f"unknown flag `{letter}`", self.at - 1)
        return flags

    def repeated(self, flags: Flags, depth: int) -> Node:
        begin = self.at
        node = self.atom(flags, depth)
        while True:
            bounds = self.bounds()
            if bounds is None:
                return node
            low, high = bounds
            if high is not None and high < low:
                raise self.error(f"{{{low},{high}}} is upside down", begin)
            if max(low, high or 0) > MOST_REPEATS:
                raise self.error(f"more than {MOST_REPEATS} repetitions", begin)
            if (low, high) != (1, 1):
                node = Repeat(node, low, high)
            self.take("?")

    def bounds(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self.take(sign):
                return bounds
        if not self.peek("{"):
            return None
        end = self.pattern.find("}", self.at)
        low, comma, high = self.pattern[self.at + 1 : end].partition(",") if end > 0 else ("", "", "")
        if not (low.isascii() and low.isdigit() and (high == "" or (high.isascii() and high.isdigit()))):
            return None  # a literal brace, as in RE2
        self.at = end + 1
        return int(low), (int(high) if high else None) if comma else int(low)

    def atom(self, flags: Flags, depth: int) -> Node:
        begin = self.at
        letter = self.next()
        if letter == "(":
            return self.group(flags, depth, begin)
        if letter == "[":
            return Chars(self.bracket(flags, begin))
        if letter == "\\":
            return self.escape(flags)
        if letter == ".":
            return Chars(cs.ANY if flags.dot_all else cs.complement(cs.NEWLINE))
        if letter == "^":
            return Look("behind", cs.NEWLINE if flags.multi_line else (), edge=True)
        if letter == "$":
            return Look("ahead", cs.NEWLINE if flags.multi_line else (), edge=True)
        if letter in "*+?":
            raise self.error(f"nothing to repeat before `{letter}`", begin)
        return Chars(self.folded(cs.of(letter), flags))

    def folded(self, chars: CharSet, flags: Flags) -> CharSet:
        return cs.fold(chars) if flags.ignore_case else chars

    def group(self, flags: Flags, depth: int, begin: int) -> Node:
        name = None
        captures = True
        if self.take("?"):
            captures = False
            if self.take("P<") or (self.peek("<") and self.pattern[self.at + 1 : self.at + 2] not in "=!"):
                self.take("<")
                end = self.pattern.find(">", self.at)
                if end < 0:
                    raise self.error("a group's name does not end", begin)
                name, self.at, captures = self.pattern[self.at : end], end + 1, True
            elif self.pattern[self.at : self.at + 1] in "=!" or self.peek("<=") or self.peek("<!"):
                return self.look_around(flags, depth, begin)
            elif not self.take(":"):
                flags = self.flags_up_to(":", flags)
        node = self.alternatives(flags, depth + 1)
        if not self.take(")"):
            raise self.error("`(` is never closed", begin)
        return Group(node, name) if captures else node

    def look_around(self, flags: Flags, depth: int, begin: int) -> Node:
        behind = self.take("<")
        negated = self.next() == "!"
        node = self.alternatives(flags, depth + 1)
        if not self.take(")"):
            raise self.error("`(` is never closed", begin)
        chars: CharSet = ()
        edge = False
        for option in node.options if isinstance(node, Alt) else (node,):
            if isinstance(option, Chars):
                chars = cs.union(chars, option.chars)
            elif isinstance(option, Look) and option.where == ("behind" if behind else "ahead") and option.edge:
                chars, edge = cs.union(chars, option.chars), True
            else:
                raise self.error("look-around wider than one character", begin)
        where = "behind" if behind else "ahead"
        return Look(where, cs.complement(chars), not edge) if negated else Look(where, chars, edge)

    # -- characters ---------------------------------------------------------------------------------------------

    def escape(self, flags: Flags) -> Node:
        begin = self.at - 1
        letter = self.next()
        if letter in "bB":
            return Boundary(letter == "B")
        if letter == "A":
            return Look("behind", (), edge=True)
        if letter == "z":
            return Look("ahead", (), edge=True)
        if letter == "Q":
            end = self.pattern.find("\\E", self.at)
            literal = self.pattern[self.at : end if end >= 0 else len(self.pattern)]
            self.at = end + 2 if end >= 0 else len(self.pattern)
            return _cat([Chars(self.folded(cs.of(c), flags)) for c in literal])
        if letter.isdigit() and letter != "0":
            raise self.error("back-references need more than linear time", begin)
        return Chars(self.folded(self.escaped(letter, begin), flags))

    def escaped(self, letter: str, begin: int) -> CharSet:
        """The set of an escape that stands for characters, inside brackets or outside."""
        classes = {"d": cs.DIGIT, "w": cs.WORD, "s": cs.SPACE}
        if letter.lower() in classes:
            chosen = classes[letter.lower()]
            return chosen if letter.islower() else cs.complement(chosen)
        controls = {"n": "\n", "r": "\r", "t": "\t", "f": "\f", "v": "\v", "a": "\a", "0": "\0"}
        if letter in controls:
            return cs.of(controls[letter])
        if letter == "x":
            return cs.of(self.hexadecimal(begin))
        if letter.isascii() and letter.isalnum():
            raise self.error(f"unknown escape `\\{letter}`", begin)
        return cs.of(letter)

    def hexadecimal(self, begin: int) -> str:
        if self.take("{"):
            end = self.pattern.find("}", self.at)
            digits, self.at = self.pattern[self.at : end], end + 1
        else:
            digits, self.at = self.pattern[self.at : self.at + 2], self.at + 2
        try:
            return chr(int(digits, 16))
        except (ValueError, OverflowError):
            raise self.error("bad hexadecimal escape", begin) from None

    def bracket(self, flags: Flags, begin: int) -> CharSet:
        negated = self.take("^")
        chars: CharSet = ()
        first = True
        while first or not self.peek("]"):
            if self.at >= len(self.pattern):
                raise self.error("`[` is never closed", begin)
            first = False
            if self.take("[:"):
                chars = cs.union(chars, self.posix())
                continue
            low = self.member()
            if self.peek("-") and not self.peek("-]") and len(low) == 1 and low[0][0] == low[0][1]:
                place = self.at
                self.take("-")
                high = self.member()
                if len(high) != 1 or high[0][0] != high[0][1] or high[0][0] < low[0][0]:
                    raise self.error("a range that is no range", place)
                low = ((low[0][0], high[0][0]),)
            chars = cs.union(chars, low)
        self.take("]")
        chars = self.folded(chars, flags)
        return cs.complement(chars) if negated else chars

    def member(self) -> CharSet:
        begin = self.at
        letter = self.next()
        if letter != "\\":
            return cs.of(letter)
        letter = self.next()
        return cs.of("\b") if letter == "b" else self.escaped(letter, begin)

    def posix(self) -> CharSet:
        begin = self.at - 2
        end = self.pattern.find(":]", self.at)
        name = self.pattern[self.at : end] if end >= 0 else ""
        if name.removeprefix("^") not in cs.POSIX:
            raise self.error(f"unknown class `[:{name}:]`", begin)
        self.at = end + 2
        chars = cs.POSIX[name.removeprefix("^")]
        return cs.complement(chars) if name.startswith("^") else chars


def _cat(parts: list[Node]) -> Node:
    flat: list[Node] = []
    for part in parts:
        flat.extend(part.parts if isinstance(part, Cat) else [part])
    return flat[0] if len(flat) == 1 else Cat(tuple(flat))


def literal(text: str, *, ignore_case: bool = False) -> Node:
    """A tree that matches exactly this text."""
    sets = [cs.of(c) for c in text]
    return _cat([Chars(cs.fold(one) if ignore_case else one) for one in sets])


def widths(node: Node) -> tuple[int, int | None]:
    """(fewest, most) characters of a match; most is None when unbounded."""
    if isinstance(node, Chars):
        return 1, 1
    if isinstance(node, (Look, Boundary)):
        return 0, 0
    if isinstance(node, Group):
        return widths(node.node)
    if isinstance(node, Repeat):
        low, high = widths(node.node)
        if high == 0:
            return 0, 0
        return low * node.low, None if high is None or node.high is None else high * node.high
    inner = [widths(part) for part in (node.parts if isinstance(node, Cat) else node.options)]
    lows, highs = [low for low, _ in inner], [high for _, high in inner]
    pick = (sum, sum) if isinstance(node, Cat) else (min, max)
    most = None if None in highs else pick[1]([h for h in highs if h is not None] or [0])
    return pick[0](lows or [0]), most


def first_chars(node: Node) -> tuple[CharSet, bool]:
    """(characters a match can begin with, whether it can be empty)."""
    if isinstance(node, Chars):
        return node.chars, False
    if isinstance(node, (Look, Boundary)):
        return (), True
    if isinstance(node, Group):
        return first_chars(node.node)
    if isinstance(node, Repeat):
        chars, empty = first_chars(node.node)
        return chars, empty or node.low == 0
    if isinstance(node, Alt):
        found = [first_chars(option) for option in node.options]
        return cs.union(*(chars for chars, _ in found)), any(empty for _, empty in found)
    chars = ()
    for part in node.parts:
        more, empty = first_chars(part)
        chars = cs.union(chars, more)
        if not empty:
            return chars, False
    return chars, True
