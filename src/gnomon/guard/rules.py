"""A rule: a pattern, what must hold of what it finds, and a name. Packs of rules are YAML files.

In a pattern with one capture group the group is the sensitive part; what stands before it is context that streams
on, what stands after it is reduced to the characters it may begin with. Knows nothing of actions or streams.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from gnomon.errors import ConfigError
from gnomon.guard import charset as cs
from gnomon.guard.checks import make_check
from gnomon.guard.regex import Cat, Chars, Group, Look, Node, PatternError, first_chars, literal, parse, widths

KINDS = ("words", "regex", "rules")
"""Checks by rules that are given with them; beside these there are the packs."""
PACKS = Path(__file__).parent / "packs"
Checked = Callable[[str], bool]
RULE_KEYS = ("id", "regex", "words", "help", "entropy", "digits", "check", "stopwords", "example", "entity", "match")
ASSIGNED = (
    r"(?:{name})[\w.\[\] \t-]{{0,32}}?[\"'`]?[ \t]{{0,4}}(?:=>|\?=|:{{0,3}}=|:|>|,|\|\|)"
    r"\s{{0,8}}(?:[bru]?[\"'`]{{1,3}})?"
)
"""How configuration, code and shell give a name a value; `{name}` is the name's own pattern."""


@dataclass(frozen=True)
class Rule:
    """before, secret: see above. check: what the found text must pass. entity: the kind of personal data, if it is."""

    id: str
    secret: Node
    before: Node | None = None
    check: Checked | None = None
    help: str = ""
    entity: str = ""
    pattern: str = ""
    notes: tuple[str, ...] = field(default=(), compare=False)

    @property
    def width(self) -> tuple[int, int | None]:
        return widths(self.secret)


def make_rule(id: str, pattern: str, *, ignore_case: bool = False, **more: Any) -> Rule:
    """A rule from a pattern. Raises PatternError, also when the pattern matches the empty text."""
    before, secret, notes = split_capture(parse(pattern, ignore_case=ignore_case), pattern)
    if widths(secret)[0] == 0:
        raise PatternError(pattern, 0, "a rule may not match the empty text")
    return Rule(id, secret, before, pattern=pattern, notes=notes, **more)


def split_capture(node: Node, pattern: str) -> tuple[Node | None, Node, tuple[str, ...]]:
    """(what stands before the capture, the capture with what must follow it, remarks)."""
    parts = node.parts if isinstance(node, Cat) else (node,)
    places = [place for place, part in enumerate(parts) if isinstance(part, Group)]
    if len(places) != 1:
        return None, node, ()
    before, group, after = parts[: places[0]], parts[places[0]], parts[places[0] + 1 :]
    assert isinstance(group, Group)
    while before and widths(before[0])[0] == 0 and not _asserts(before[0]):
        before = before[1:]  # context may begin anywhere: what may be missing there says nothing
    secret: Node = group.node
    notes: tuple[str, ...] = ()
    if before and all(_asserts(part) for part in before):
        secret, before = Cat((*before, secret)), ()
    if after:
        if all(_asserts(part) for part in after):
            secret = Cat((secret, *after))
        else:
            chars, empty = first_chars(Cat(after))
            if not empty:
                if any(widths(part)[1] != 1 for part in after[:1]) or len(after) > 1:
                    notes = ("what follows the capture is checked by its first character only",)
                edge = any(isinstance(part, Look) for part in _flat(after[0]))
                secret = Cat((secret, Look("ahead", chars, edge)))
            elif any(isinstance(part, Look) for part in _flat(Cat(after))) and chars:
                secret = Cat((secret, Look("ahead", chars, edge=True)))
    return Cat(tuple(before)) if before else None, secret, notes


def _asserts(node: Node) -> bool:
    return (
        not isinstance(node, (Chars, Group))
        and widths(node) == (0, 0)
        and not (isinstance(node, Cat) and not node.parts)
    )


def _flat(node: Node) -> list[Node]:
    inner = getattr(node, "options", None) or getattr(node, "parts", None)
    return [leaf for part in inner for leaf in _flat(part)] if inner else [node]


def word_rule(id: str, words: list[str], *, match: str = "word", ignore_case: bool = True) -> Rule:
    """Any of these words; match: "word" (with word boundaries) or "str" (anywhere)."""
    from gnomon.guard.regex import Alt

    nodes = [literal(word, ignore_case=ignore_case) for word in words if word]
    if not nodes:
        raise ConfigError(f"The rule `{id}` has no words.", param="words")
    node: Node = nodes[0] if len(nodes) == 1 else Alt(tuple(nodes))
    if match == "word":
        edge = cs.complement(_letters())
        node = Cat((Look("behind", edge, True), node, Look("ahead", edge, True)))
    return Rule(id, node, pattern="|".join(words) if len(words) < 8 else f"{len(words)} words")


@cache
def _letters() -> cs.CharSet:
    """Letters, digits and marks of all scripts up to U+FFFF: what a word is made of."""
    return cs.charset((code, code) for code in range(0x10000) if chr(code).isalnum() or code == 95)


_own: dict[str, Rule] = {}


def rule(id: str, pattern: str, *, help: str = "", entity: str = "") -> Callable[[Checked], Checked]:
    """Register a rule of one's own: what `pattern` finds counts when the decorated function of the text says so.

    Its name can be used in a policy like a pack's.
    """

    def register(check: Checked) -> Checked:
        _own[id] = make_rule(id, pattern, check=check, help=help, entity=entity)
        return check

    return register


def pack(name: str) -> tuple[Rule, ...]:
    """The rules of a name: one registered by `@rule`, or a built-in pack. Raises ConfigError naming what there is."""
    return (_own[name],) if name in _own else _pack(name)


@cache
def _pack(name: str) -> tuple[Rule, ...]:
    path = PACKS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"No rule pack `{name}`.", hint=f"Built in: {', '.join(pack_names())}.", param="rules")
    return read_rules(path)


def pack_names() -> list[str]:
    return sorted([*(path.stem for path in PACKS.glob("*.yaml")), *_own])


def read_rules(path: Path) -> tuple[Rule, ...]:
    """A pack file. Raises ConfigError naming file, rule and key; PatternError with the character."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"The rules {path} cannot be read: {error}.", param="rules") from None
    if not isinstance(content, dict) or not isinstance(content.get("rules"), list):
        raise ConfigError(f"{path}: a pack is a mapping with a list `rules`.", param="rules")
    names = content.get("define", {})
    return tuple(rule_of(one, str(path), names) for one in content["rules"])


def rule_of(one: Any, source: str, names: Mapping[str, str] | None = None) -> Rule:
    """One rule of a pack: `regex`, or `assigned` (a name's pattern) with `value`, or `words`."""
    if not isinstance(one, dict) or "id" not in one:
        raise ConfigError(f"{source}: a rule is a mapping with an `id`.", param="rules")
    id = str(one["id"])
    known = (*RULE_KEYS, "assigned", "value", "ignore_case")
    if unknown := sorted(set(one) - set(known)):
        raise ConfigError(f"{source}: rule `{id}`: unknown key `{unknown[0]}`.", hint=f"Known: {', '.join(known)}.")
    about: dict[str, Any] = {"help": str(one.get("help", "")), "entity": str(one.get("entity", ""))}
    check = make_check(one, f"{source}: rule `{id}`")
    if "words" in one:
        made = word_rule(id, [str(word) for word in one["words"]], match=one.get("match", "word"))
        return Rule(id, made.secret, check=check, pattern=made.pattern, **about)
    pattern = str(one.get("regex", ""))
    if "assigned" in one:
        pattern = "(?i)" + ASSIGNED.format(name=one["assigned"]) + f"({one['value']})"
    if not pattern:
        raise ConfigError(f"{source}: rule `{id}` has neither `regex`, `assigned` nor `words`.")
    for name, text in (names or {}).items():
        pattern = pattern.replace("{" + name + "}", text)
    return make_rule(id, pattern, ignore_case=bool(one.get("ignore_case", False)), check=check, **about)
