"""compile(): a schema, a regular expression, a context-free grammar, choices or a Python type -> one Grammar.

Exactly one kind is given. Everything is checked here, before a model is touched: what is wrong is an error that says
where, what is not in the mask stands in the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from gnomon.errors import GrammarError
from gnomon.grammar.ebnf import ebnf_to_lark
from gnomon.grammar.grammar import Grammar
from gnomon.grammar.matcher import Matcher
from gnomon.grammar.python_types import schema_of_type
from gnomon.grammar.report import Report
from gnomon.grammar.schema.build import compile_schema
from gnomon.grammar.schema.checks import PatternHints
from gnomon.grammar.schema.lookaround import language
from gnomon.grammar.schema.patterns import for_mask
from gnomon.grammar.structural import structural_tag as tagged
from gnomon.grammar.vocabulary import Vocabulary, byte_vocabulary, vocabulary_of
from gnomon.models.tokenizer import Tokenizer

MOST_CHOICES = 10_000
MOST_GRAMMAR = 1_000_000
WHITESPACE = {"compact": None, "flexible": r"[ \n]{0,2}"}


def compile(
    schema: Any = None,
    *,
    regex: str | None = None,
    lark: str | None = None,
    gbnf: str | None = None,
    ebnf: str | None = None,
    choices: Sequence[str] | None = None,
    structural_tag: Any = None,
    type: Any = None,
    registry: Mapping[str, Any] | None = None,
    formats: str = "assert",
    whitespace: str = "compact",
    any_order: bool = False,
    tokenizer: Tokenizer | None = None,
    seconds: float | None = None,
) -> Grammar:
    """Compile one grammar.

    schema: a JSON Schema (mapping, bool or JSON text). regex: matches the whole text. lark, gbnf, ebnf: context-free
    grammars, the last as the W3C writes them. choices: the exact texts allowed. structural_tag: free text with tags in
    it, in vLLM's and xgrammar's JSON. type: a pydantic model, dataclass, TypedDict, Enum, Literal, or any type
    that pydantic takes. registry: documents that `$ref` may name, by URI. formats: "assert" or "annotate". whitespace:
    "compact" or "flexible" (up to two spaces or line breaks between tokens of JSON). any_order: keys of objects are
    written in any order, not in the schema's. tokenizer: of the model that will write; its masks are then made at once,
    which makes the first one come sooner. seconds: compile in a process of its own, which is ended when it takes longer
    (starting it takes about a second, the first time).
    Raises GrammarError.
    """
    given = {"schema": schema, "regex": regex, "lark": lark, "gbnf": gbnf, "ebnf": ebnf, "choices": choices}
    given |= {"structural_tag": structural_tag, "type": type}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise GrammarError(
            f"A grammar is made of exactly one of {', '.join(given)}; given: {', '.join(named) or 'none'}.",
            param="grammar",
        )
    if whitespace not in WHITESPACE or formats not in ("assert", "annotate"):
        raise GrammarError('`whitespace` is "compact" or "flexible", `formats` is "assert" or "annotate".')
    if seconds is not None:
        more = {"registry": registry, "formats": formats, "whitespace": whitespace, "any_order": any_order}
        return _within(seconds, given, more)
    vocabulary = byte_vocabulary() if tokenizer is None else vocabulary_of(tokenizer)
    if regex is not None:
        return _of_regex(regex, vocabulary)
    if choices is not None:
        return _of_choices(choices, vocabulary)
    if lark is not None:
        return _of_lark(lark, "lark", vocabulary)
    if gbnf is not None:
        return _of_lark(_from_gbnf(gbnf), "gbnf", vocabulary)
    if ebnf is not None:
        return _of_lark(ebnf_to_lark(ebnf) if isinstance(ebnf, str) else ebnf, "ebnf", vocabulary)
    if structural_tag is not None:
        return tagged(read_schema(structural_tag), spaces=WHITESPACE[whitespace], vocabulary=vocabulary)
    convert = None
    if type is not None:
        schema, convert = schema_of_type(type)
    schema = read_schema(schema)
    compiled = compile_schema(
        schema,
        registry=registry,
        assert_formats=formats == "assert",
        spaces=WHITESPACE[whitespace],
        vocabulary=vocabulary,
        any_order=any_order,
    )
    return Grammar(
        compiled.grammar,
        compiled.report,
        unsatisfiable=compiled.unsatisfiable,
        validators=compiled.validators,
        convert=convert,
        source=schema,
        matcher=compiled.matcher,
    )


def _within(seconds: float, given: Mapping[str, Any], more: Mapping[str, Any]) -> Grammar:
    """What `compile` does, in a worker's time."""
    from gnomon.grammar.cache import compile_within  # which stands on this module

    convert = None
    arguments = {name: value for name, value in {**given, **more}.items() if value is not None}
    if "type" in arguments:
        arguments["schema"], convert = schema_of_type(arguments.pop("type"))
    return compile_within(seconds, arguments, convert)


def _of_regex(pattern: str, vocabulary: Vocabulary) -> Grammar:
    if not isinstance(pattern, str) or len(pattern) > MOST_GRAMMAR:
        raise GrammarError("`regex` is a pattern of at most a million characters.", param="regex")
    mask = for_mask(pattern, whole=True)
    if mask is None:
        raise GrammarError(
            f"The pattern {pattern[:80]!r} uses back-references, or look-around that has no small automaton.",
            hint="They cannot be enforced while a text is written. Say it without them.",
            param="regex",
        )
    return _made(str(LLMatcher.grammar_from_regex(mask)), "regex", pattern, vocabulary, pattern_hints(pattern))


def _of_choices(choices: Sequence[str], vocabulary: Vocabulary) -> Grammar:
    if isinstance(choices, str) or not choices or not all(isinstance(choice, str) and choice for choice in choices):
        raise GrammarError("`choices` is a list of one or more texts, none of them empty.", param="choices")
    if len(choices) > MOST_CHOICES:
        raise GrammarError(f"At most {MOST_CHOICES} choices; given {len(choices)}.", param="choices")
    alternatives = "\n     | ".join(json.dumps(choice, ensure_ascii=False) for choice in dict.fromkeys(choices))
    return _made(str(LLMatcher.grammar_from_lark(f"start: {alternatives}")), "choices", list(choices), vocabulary)


def _of_lark(text: str, kind: str, vocabulary: Vocabulary) -> Grammar:
    if not isinstance(text, str) or not text.strip() or len(text) > MOST_GRAMMAR:
        raise GrammarError(f"`{kind}` is a grammar of at most a million characters.", param=kind)
    return _made(str(LLMatcher.grammar_from_lark(text)), kind, text, vocabulary)


def _from_gbnf(text: str) -> str:
    try:
        return str(any_to_lark(text))
    except Exception as error:  # the reader raises plain exceptions
        raise GrammarError(f"The GBNF grammar cannot be read: {error}.", param="gbnf") from None


def pattern_hints(pattern: str) -> PatternHints | None:
    """The way to an end of a pattern's texts, where it has an automaton."""
    automaton = language(pattern, whole=True)
    return None if automaton is None else PatternHints(automaton)


def _made(mask: str, kind: str, source: Any, vocabulary: Vocabulary, hints: PatternHints | None = None) -> Grammar:
    try:
        matcher = Matcher(vocabulary, mask)
    except GrammarError as error:
        if "Unsatisfiable" in error.message:
            return Grammar(mask, Report(kind, unsatisfiable=True), unsatisfiable=True, source=source)
        raise GrammarError(f"The {kind} grammar is wrong: {error.message}", param=kind) from None
    return Grammar(mask, Report(kind), checks=hints, source=source, matcher=matcher)


def read_schema(given: Any) -> Any:
    """A schema (or a structural tag), or its JSON text -> the value. Raises GrammarError."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"The schema is not JSON: {error}.", param="schema") from None
