"""A Grammar: what a text must be, compiled. It judges texts by itself; `bind` ties it to a model's vocabulary.

Two parts: the mask (an llguidance grammar) and the checks behind it (for schemas). Immutable, shared by requests.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from gnomon.errors import GrammarError
from gnomon.grammar.closing import Checks, NoChecks, shortest
from gnomon.grammar.matcher import Matcher
from gnomon.grammar.report import Report
from gnomon.grammar.schema.checks import SchemaChecks
from gnomon.grammar.schema.reading import load
from gnomon.grammar.schema.validators import Validators
from gnomon.grammar.vocabulary import Vocabulary, byte_vocabulary, vocabulary_of
from gnomon.models.tokenizer import Tokenizer

Whitespace = Literal["any", "as_generated"]


@dataclass(frozen=True)
class Verdict:
    """Whether a text is accepted; if not, where it went wrong (a character's place) and why."""

    ok: bool
    position: int | None = None
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


class Grammar:
    """compile() makes it. mask: for llguidance; report: or what makes it when it is read; validators: of a schema's
    values; checks: of other kinds, if any; matcher: a walk at its beginning, where one was made already;
    controls: control tokens that are part of its texts."""

    def __init__(
        self,
        mask: str,
        report: Report | Callable[[], Report],
        *,
        unsatisfiable: bool = False,
        validators: Validators | None = None,
        checks: Checks | None = None,
        convert: Callable[[Any], Any] | None = None,
        source: Any = None,
        matcher: Matcher | None = None,
        controls: tuple[str, ...] = (),
    ) -> None:
        self.mask = mask
        self._report = report
        self.unsatisfiable = unsatisfiable
        self.validators = validators
        self.source = source
        self.controls = controls
        self._convert = convert
        self._checks = checks
        self._shortest: str | None = None
        self._searched = False
        self._lock = threading.RLock()
        self._prototypes: dict[int, Matcher] = {} if matcher is None else {id(matcher.vocabulary): matcher}

    @cached_property
    def report(self) -> Report:
        """What becomes of every keyword."""
        return self._report if isinstance(self._report, Report) else self._report()

    # -- texts --------------------------------------------------------------------------------------------------

    def accepts(self, text: str, *, whitespace: Whitespace = "any", any_order: bool = True) -> Verdict:
        """Decide a whole text.

        For a schema the defaults accept every spelling of a valid JSON value: any legal whitespace, escapes and order
        of keys. whitespace="as_generated", any_order=False replays exactly what decoding does: masks, then checks.
        Other grammars know one spelling only.
        """
        if self.unsatisfiable:
            return Verdict(False, 0, "No text satisfies this grammar.")
        if self.validators is None or (whitespace == "as_generated" and not any_order):
            return self._replay(text)
        try:
            value = load(text)
        except RecursionError:
            return Verdict(False, 0, "The JSON is nested too deep.")
        except json.JSONDecodeError as error:
            return Verdict(False, error.pos, f"Not JSON: {error.msg}.")
        except ValueError as error:
            return Verdict(False, 0, f"Not JSON: {error}.")
        compact = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
        if any_order:
            if whitespace == "as_generated" and len(text) != len(_without_spaces(text)):
                return Verdict(False, 0, "There is whitespace that decoding never writes.")
            return self._value(value)
        return self._replay(compact)

    def known_shortest(self) -> str | None:
        """A shortest accepted text; None when the search, which is bounded, found none."""
        with self._lock:
            if not self._searched:
                found = None if self.unsatisfiable else shortest(self.byte_matcher(), self.checks)
                self._shortest = None if found is None else found.decode("utf-8", "replace")
                self._searched = True
        return self._shortest

    def shortest(self) -> str:
        """A shortest accepted text. Raises GrammarError when there is none, or none was found within bounds."""
        if self.known_shortest() is None:
            if self.unsatisfiable:
                raise GrammarError(
                    "No text satisfies this grammar.", hint="Its constraints contradict each other.", param="grammar"
                )
            raise GrammarError(
                "No text was found that satisfies this grammar; the search is bounded.",
                hint="Say more in ways the mask enforces: `gnomon grammar check` shows which those are.",
                param="grammar",
            )
        assert self._shortest is not None
        return self._shortest

    def converting(self, convert: Callable[[Any], Any] | None) -> Grammar:
        """This grammar, whose values become a type."""
        self._convert = convert
        return self

    def remember(self, shortest: str | None) -> None:
        """What a search for the shortest text found before."""
        self._shortest, self._searched = shortest, True

    def parse(self, text: str) -> Any:
        """An accepted text as a value: of JSON, or of the type it was compiled from; other kinds are text."""
        if self.validators is None:
            return self._convert(text) if self._convert else text
        value = load(text)
        return self._convert(value) if self._convert else value

    # -- for decoding -------------------------------------------------------------------------------------------

    @cached_property
    def checks(self) -> Checks:
        """What stands behind the mask."""
        if self._checks is not None:
            return self._checks
        return NoChecks() if self.validators is None else SchemaChecks(self.validators)

    def matcher(self, vocabulary: Vocabulary) -> Matcher:
        """A fresh walk over a vocabulary."""
        with self._lock:
            return self._prototype(vocabulary).copy()

    def byte_matcher(self) -> Matcher:
        return self.matcher(byte_vocabulary())

    def bind(self, tokenizer: Tokenizer) -> Matcher:
        """A fresh walk over a model's vocabulary."""
        return self.matcher(self.vocabulary(tokenizer))

    def vocabulary(self, tokenizer: Tokenizer) -> Vocabulary:
        return vocabulary_of(tokenizer, self.controls)

    def shortest_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The shortest text as the tokens that decoding would write."""
        known: dict[str, list[int]] = self.__dict__.setdefault("_spelled", {})
        key = f"{tokenizer.sha256}/{tokenizer.vocab_size}"
        if key not in known:
            known[key] = spell(self.bind(tokenizer), self.shortest().encode())
        return list(known[key])

    def _prototype(self, vocabulary: Vocabulary) -> Matcher:
        made = self._prototypes
        if id(vocabulary) not in made:
            if len(made) > 4:
                made.clear()
            made[id(vocabulary)] = Matcher(vocabulary, self.mask)
        return made[id(vocabulary)]

    # -- verdicts -----------------------------------------------------------------------------------------------

    def _value(self, value: Any) -> Verdict:
        assert self.validators is not None
        try:
            fault = "" if self.validators.accepts(value) else self.validators.fault(value) or "not valid"
        except (ValueError, RecursionError) as error:
            fault = str(error)
        return Verdict(not fault, None, fault)

    def _replay(self, text: str) -> Verdict:
        """Byte by byte through the mask and the checks."""
        try:
            raw = text.encode()
        except UnicodeEncodeError as error:
            return Verdict(False, error.start, "Not valid Unicode.")
        matcher = self.byte_matcher()
        taken = matcher.advance(list(raw))
        if taken < len(raw):
            position = len(raw[:taken].decode("utf-8", "ignore"))
            return Verdict(False, position, f"The mask does not allow {text[position : position + 12]!r} here.")
        if not matcher.accepting:
            return Verdict(False, len(text), "The text is not complete.")
        place = self.checks.read(self.checks.begin(), raw)
        if place is None or not self.checks.may_end(place, raw):
            return Verdict(False, None, self._fault(text))
        return Verdict(True)

    def _fault(self, text: str) -> str:
        try:
            return self.validators.fault(load(text)) if self.validators else "not valid"
        except ValueError as error:
            return str(error)


def spell(matcher: Matcher, text: bytes) -> list[int]:
    """A text as tokens that the matcher takes: canonical where it can, else the longest that fit."""
    engine = matcher.vocabulary.engine
    tokens = list(engine.tokenize_bytes(text))
    if b"".join(engine.decode_bytes([t]) for t in tokens) == text and matcher.copy().advance(tokens) == len(tokens):
        return tokens
    walk, tokens = matcher.copy(), []
    while text:
        token = _longest(walk, text)
        walk.accept(token)
        tokens.append(token)
        text = text[len(engine.decode_bytes([token])) :]
    return tokens


def _longest(matcher: Matcher, text: bytes) -> int:
    """The allowed token that spells the longest beginning of a text."""
    engine = matcher.vocabulary.engine
    for length in range(min(len(text), 32), 0, -1):
        tokens = (
            engine.greedy_tokenize(text[:length].decode("utf-8", "surrogateescape")) if _whole(text[:length]) else []
        )
        if len(tokens) == 1 and matcher.copy().accept(tokens[0]):
            return int(tokens[0])
    for token in matcher.allowed().nonzero()[0].tolist():
        spelled = bytes(engine.decode_bytes([token]))
        if spelled and text.startswith(spelled) and token not in matcher.vocabulary.ends:
            return int(token)
    raise GrammarError("The model's vocabulary cannot spell a text of this grammar.")


def _whole(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


_STRING_OR_SPACE = re.compile(r'("(?:[^"\\]|\\.)*")|[ \t\r\n]+')


def _without_spaces(text: str) -> str:
    """JSON text without the whitespace between its tokens."""
    return _STRING_OR_SPACE.sub(lambda found: found.group(1) or "", text)
