"""Structural tags: text in which some parts are free and others are held to a schema, pattern or grammar.

In: vLLM's and xgrammar's JSON, in both spellings: `{"type": "structural_tag", "format": {...}}`, and the older one with
`structures` (begin, schema, end) and `triggers`. Out: one Grammar. Free text holds no trigger; after a trigger one of
its tags follows to its end. What is not known is refused by name. Knows nothing of HTTP or models.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llguidance.gbnf_to_lark import any_to_lark

from gnomon.errors import GrammarError
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.matcher import Matcher
from gnomon.grammar.report import Report
from gnomon.grammar.schema.build import compile_schema
from gnomon.grammar.schema.patterns import escaped, for_mask
from gnomon.grammar.schema.validators import Validators
from gnomon.grammar.vocabulary import Vocabulary, byte_vocabulary

MOST_REPEATS = 1000
MOST_PARTS = 2000
MOST_SUGGESTIONS = 12
ANY = "/(.|\\n)*/"


def structural_tag(given: Any, *, spaces: str | None = None, vocabulary: Vocabulary | None = None) -> Grammar:
    """spaces: a pattern of the whitespace between tokens of JSON; None: none. Raises GrammarError with the path."""
    made = _Rules(spaces)
    form = _format_of(given)
    made.rules.insert(0, f"start: {made.rule(form, 'structural_tag')}")
    parts = [{"name": "main", "lark_grammar": "%llguidance {}\n" + "\n".join(made.rules) + "\n"}, *made.grammars]
    mask = json.dumps({"grammars": parts})
    try:
        matcher = Matcher(vocabulary or byte_vocabulary(), mask)
    except GrammarError as error:
        raise GrammarError(f"The structural tag cannot be enforced: {error.message}", param="structural_tag") from None
    if made.judged and made.open:
        raise GrammarError(
            f"The schema of the tag {next(iter(made.judged))!r} has keywords that are checked afterwards, which needs "
            f"free text to stand in `triggered_tags` alone; here is {made.open[0]}.",
            hint="Use triggered_tags, or leave out what `gnomon grammar check` calls post-validated.",
            param="structural_tag",
        )
    checks = TagChecks(made.judged, made.fixed)
    return Grammar(mask, Report("structural_tag"), checks=checks, source=given, matcher=matcher)


def _format_of(given: Any) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise GrammarError("`structural_tag` is an object.", param="structural_tag")
    if isinstance(form := given.get("format"), Mapping):
        return form
    structures, triggers = given.get("structures"), given.get("triggers")
    if not isinstance(structures, list) or not isinstance(triggers, list):
        raise GrammarError(
            "`structural_tag` has a `format`, or `structures` (begin, schema, end) and `triggers`.",
            param="structural_tag",
        )
    tags = [
        {
            "begin": one.get("begin"),
            "content": {"type": "json_schema", "json_schema": one.get("schema")},
            "end": one.get("end"),
        }
        for one in structures
        if isinstance(one, Mapping)
    ]
    return {"type": "triggered_tags", "triggers": triggers, "tags": tags}


@dataclass
class _Rules:
    """Lark rules as they are written. judged: validators behind the mask, by a tag's begin; open: other free text;
    fixed: texts that stand for themselves."""

    spaces: str | None
    rules: list[str] = field(default_factory=list)
    grammars: list[dict[str, str]] = field(default_factory=list)
    judged: dict[str, tuple[Validators, str]] = field(default_factory=dict)
    open: list[str] = field(default_factory=list)
    fixed: list[str] = field(default_factory=list)

    def rule(self, form: Any, where: str) -> str:
        """The name of a new rule that says this format."""
        kind = form.get("type") if isinstance(form, Mapping) else None
        maker = getattr(self, f"_{kind}", None) if kind in KINDS else None
        if maker is None:
            raise GrammarError(f"`{where}.type` is {kind!r}; known: {', '.join(KINDS)}.", param=where)
        if len(self.rules) > MOST_PARTS:
            raise GrammarError(f"The structural tag has more than {MOST_PARTS} parts.", param="structural_tag")
        return self._add(maker(form, where))

    def _add(self, body: str, *, kind: str = "part", flag: str = "") -> str:
        name = f"{kind}_{len(self.rules)}"
        self.rules.append(f"{name}{flag}: {body}")
        return name

    # -- what is held to something ------------------------------------------------------------------------------

    def _const_string(self, form: Mapping[str, Any], where: str) -> str:
        return _literal(form, "value", where)

    def _json_schema(self, form: Mapping[str, Any], where: str, begin: str = "", end: str = "") -> str:
        try:
            compiled = compile_schema(form.get("json_schema"))
        except GrammarError as error:
            raise GrammarError(error.message, hint=error.hint, param=f"{where}.json_schema") from None
        if compiled.unsatisfiable:
            raise GrammarError("No text satisfies this schema.", param=f"{where}.json_schema")
        left = compiled.report().post_validated
        if left and not begin:
            raise GrammarError(
                f"`{left[0].keyword}` at {left[0].path} is checked afterwards, which is done inside a tag alone.",
                param=f"{where}.json_schema",
            )
        if left:
            self.judged[begin] = (compiled.validators, end)
        options: dict[str, Any] = {"whitespace_flexible": self.spaces is not None}
        if self.spaces is not None:
            options["whitespace_pattern"] = self.spaces
        schema = compiled.lowered if isinstance(compiled.lowered, dict) else {}
        return f"%json {json.dumps({**schema, 'x-guidance': options})}"

    def _regex(self, form: Mapping[str, Any], where: str) -> str:
        pattern = form.get("pattern")
        mask = for_mask(pattern, whole=True) if isinstance(pattern, str) else None
        if mask is None:
            raise GrammarError(f"`{where}.pattern` is no pattern with an automaton: {pattern!r}.", param=where)
        self.open.append(where)
        return "/" + mask.removeprefix("^").removesuffix("$").replace("/", "\\/") + "/"

    def _grammar(self, form: Mapping[str, Any], where: str) -> str:
        text = form.get("grammar")
        if not isinstance(text, str):
            raise GrammarError(f"`{where}.grammar` is a text.", param=where)
        try:
            lark = str(any_to_lark(text))
        except Exception as error:  # the reader raises plain exceptions
            raise GrammarError(f"The grammar at `{where}.grammar` cannot be read: {error}.", param=where) from None
        name = f"grammar_{len(self.grammars)}"
        self.grammars.append({"name": name, "lark_grammar": lark})
        self.open.append(where)
        return f"@{name}"

    def _any_text(self, form: Mapping[str, Any], where: str) -> str:
        excludes = _texts(form.get("excludes", []), f"{where}.excludes", least=0)
        self.open.append(where)
        return self._add(self._free(excludes), kind="FREE")

    # -- how parts are put together -----------------------------------------------------------------------------

    def _sequence(self, form: Mapping[str, Any], where: str) -> str:
        return " ".join(self._elements(form, where))

    def _or(self, form: Mapping[str, Any], where: str) -> str:
        return " | ".join(self._elements(form, where))

    def _optional(self, form: Mapping[str, Any], where: str) -> str:
        return self.rule(form.get("content"), f"{where}.content") + "?"

    def _star(self, form: Mapping[str, Any], where: str) -> str:
        return self.rule(form.get("content"), f"{where}.content") + "*"

    def _plus(self, form: Mapping[str, Any], where: str) -> str:
        return self.rule(form.get("content"), f"{where}.content") + "+"

    def _repeat(self, form: Mapping[str, Any], where: str) -> str:
        least, most = form.get("min", 0), form.get("max")
        wrong = not isinstance(least, int) or not isinstance(most, int | None) or not 0 <= least <= MOST_REPEATS
        if wrong or (most is not None and not least <= most <= MOST_REPEATS):
            raise GrammarError(f"`{where}`: min and max are counts up to {MOST_REPEATS}.", param=where)
        return f"{self.rule(form.get('content'), f'{where}.content')}{{{least},{'' if most is None else most}}}"

    def _elements(self, form: Mapping[str, Any], where: str) -> list[str]:
        elements = form.get("elements")
        if not isinstance(elements, list) or not elements:
            raise GrammarError(f"`{where}.elements` is a list of formats.", param=where)
        return [self.rule(one, f"{where}.elements[{place}]") for place, one in enumerate(elements)]

    # -- tags ---------------------------------------------------------------------------------------------------

    def _tag(self, form: Mapping[str, Any], where: str, after: str = "") -> str:
        """after: the beginning of `begin` that was read already."""
        begin, end = form.get("begin"), form.get("end")
        if not isinstance(begin, str) or not begin or not isinstance(end, str):
            raise GrammarError(f"`{where}` has the texts `begin` and `end`.", param=where)
        self.fixed += [one for one in (begin, end) if one]
        content = form.get("content")
        if isinstance(content, Mapping) and content.get("type") == "any_text":
            return self._tag_of_text(begin.removeprefix(after), content, end, where)
        if isinstance(content, Mapping) and content.get("type") == "json_schema":
            inner = self._add(self._json_schema(content, f"{where}.content", begin, end))
        else:
            inner = self.rule(content, f"{where}.content")
        return " ".join([*_quoted(begin.removeprefix(after)), inner, *_quoted(end)])

    def _tag_of_text(self, begin: str, content: Mapping[str, Any], end: str, where: str) -> str:
        """Free text that ends where the tag's end first stands."""
        if not end or content.get("excludes"):
            raise GrammarError(
                f"`{where}`: any_text in a tag ends at the tag's `end`, and has no `excludes`.", param=where
            )
        inner = self._add(f"ANY_TEXT {json.dumps(end)}", kind="upto", flag="[lazy]")
        if "ANY_TEXT: " + ANY not in self.rules:
            self.rules.append("ANY_TEXT: " + ANY)
        return " ".join([*_quoted(begin), inner])

    def _triggered_tags(self, form: Mapping[str, Any], where: str) -> str:
        triggers = _texts(form.get("triggers"), f"{where}.triggers")
        excludes = _texts(form.get("excludes", []), f"{where}.excludes", least=0)
        tags = _tags(form, where)
        if "ANY_TEXT: " + ANY not in self.rules:
            self.rules.append("ANY_TEXT: " + ANY)
        branches: dict[str, list[str]] = {trigger: [] for trigger in triggers}
        for place, tag in enumerate(tags):
            begin = tag.get("begin")
            found = [one for one in triggers if isinstance(begin, str) and begin.startswith(one)]
            if not found:
                raise GrammarError(f"`{where}.tags[{place}].begin` begins with no trigger: {begin!r}.", param=where)
            longest = max(found, key=len)
            branches[longest].append(self._add(self._tag(tag, f"{where}.tags[{place}]", longest)))
        if unused := [trigger for trigger, found in branches.items() if not found]:
            raise GrammarError(f"`{where}.triggers`: {unused[0]!r} begins no tag.", param=where)
        segments = []
        for trigger, found in branches.items():
            before = f"({self._free(excludes)} & /(.|\\n)*/)" if excludes else "ANY_TEXT"
            opened = self._add(f"{before} {json.dumps(trigger)}", kind="trigger", flag="[lazy]")
            segments.append(f"{opened} ({' | '.join(found)})")
        segment = self._add(" | ".join(segments), kind="segment")
        tail = self._add(self._free([*triggers, *excludes]), kind="TAIL")
        least_one, only_one = bool(form.get("at_least_one")), bool(form.get("stop_after_first"))
        if only_one:
            return segment if least_one else f"{segment} | {tail}"
        return f"{segment}{'+' if least_one else '*'} {tail}?"

    def _tags_with_separator(self, form: Mapping[str, Any], where: str) -> str:
        separator = form.get("separator")
        if not isinstance(separator, str):
            raise GrammarError(f"`{where}.separator` is a text.", param=where)
        made = [self._add(self._tag(tag, f"{where}.tags[{n}]")) for n, tag in enumerate(_tags(form, where))]
        one = self._add(" | ".join(made))
        more = "" if form.get("stop_after_first") else f" ({' '.join([*_quoted(separator), one])})*"
        return f"{one}{more}" if form.get("at_least_one") else f"({one}{more})?"

    def _free(self, without: Sequence[str]) -> str:
        """A terminal's body: any text that holds none of these."""
        return ANY + "".join(f" & ~/(.|\\n)*{escaped(text)}(.|\\n)*/" for text in without)


KINDS = (
    "const_string",
    "json_schema",
    "regex",
    "grammar",
    "any_text",
    "sequence",
    "or",
    "optional",
    "star",
    "plus",
    "repeat",
    "tag",
    "triggered_tags",
    "tags_with_separator",
)


def _quoted(text: str) -> list[str]:
    return [json.dumps(text)] if text else []


def _literal(form: Mapping[str, Any], key: str, where: str) -> str:
    value = form.get(key)
    if not isinstance(value, str) or not value:
        raise GrammarError(f"`{where}.{key}` is a text, not empty.", param=where)
    return json.dumps(value)


def _texts(given: Any, where: str, least: int = 1) -> list[str]:
    if not isinstance(given, list) or len(given) < least or not all(isinstance(one, str) and one for one in given):
        raise GrammarError(f"`{where}` is a list of texts, none of them empty.", param=where)
    return given


def _tags(form: Mapping[str, Any], where: str) -> list[Mapping[str, Any]]:
    tags = form.get("tags")
    if not isinstance(tags, list) or not tags or not all(isinstance(tag, Mapping) for tag in tags):
        raise GrammarError(f"`{where}.tags` is a list of tags.", param=where)
    return tags


class TagChecks:
    """The schemas' own word on what stands in each tag, when it closes, and ways to an end.

    by_begin: (validators, the tag's end); fixed: texts that may come next.
    """

    def __init__(self, by_begin: Mapping[str, tuple[Validators, str]], fixed: Sequence[str] = ()) -> None:
        self.by_begin = by_begin
        self.fixed = tuple(dict.fromkeys(one.encode() for one in fixed))
        self.ends = [end.encode() for _, end in by_begin.values()]

    def begin(self) -> int:
        return 0

    def read(self, place: int, text: bytes) -> int | None:
        """place: characters that were judged."""
        recent = text[-64 - max(map(len, self.ends), default=0) :]
        if all(end and end not in recent for end in self.ends):
            return place
        return self._judged(text.decode("utf-8", "ignore"), place)

    def suggest(self, place: int, text: bytes) -> Iterable[bytes]:
        begun = [(one, size) for one in self.fixed for size in range(len(one) - 1, 0, -1) if text.endswith(one[:size])]
        return [*(one[size:] for one, size in begun), *self.fixed][:MOST_SUGGESTIONS]

    def may_end(self, place: int, text: bytes) -> bool:
        return self._judged(text.decode("utf-8", "ignore"), 0) is not None

    def _judged(self, text: str, place: int) -> int | None:
        """Up to where every tag is right; None: one is wrong."""
        while True:
            found = [(at, -len(begin), begin) for begin in self.by_begin if (at := text.find(begin, place)) >= 0]
            if not found:
                return place
            at, _, begin = min(found)
            validators, end = self.by_begin[begin]
            try:
                value, stop = json.JSONDecoder().raw_decode(text, at + len(begin))
            except (ValueError, RecursionError):
                return place  # not closed yet
            if not text.startswith(end, stop):
                return place
            if not validators.accepts(value):
                return None
            place = stop + len(end)
