"""Grammars: output that is always valid, and says what it cost.

`compile` makes a Grammar of a JSON Schema, a regular expression, a context-free grammar, choices or a Python type.
"""

from typing import TYPE_CHECKING, Any

from gnomon.capability import Capability, Flag

if TYPE_CHECKING:
    from gnomon.grammar.compiling import compile as compile
    from gnomon.grammar.grammar import Grammar as Grammar
    from gnomon.grammar.grammar import Verdict as Verdict
    from gnomon.grammar.report import Report as Report
    from gnomon.grammar.selecting import Selection as Selection
    from gnomon.grammar.selecting import select as select

_PARSE = "gnomon.grammar.options:parse"
GRAMMAR = Capability(
    name="grammar",
    help="What the text must be: a JSON Schema, regex, grammar or choices.",
    options="gnomon.grammar.options:GrammarOptions",
    phase="mask",
    logits_stage="gnomon.grammar.stage:build",
    parse="gnomon.grammar.options:parse_text",
    commands="gnomon.cli.grammar:app",
    routes="gnomon.serve.grammar:router",
    flags=(
        Flag("schema", "A JSON Schema that the text must match: a file, or the schema itself.", f"{_PARSE}_schema"),
        Flag("regex", "A pattern that the whole text must match.", f"{_PARSE}_regex"),
        Flag("choices", "The texts allowed, with commas between them.", f"{_PARSE}_choices"),
    ),
)

_HOMES = {
    "compile": "compiling",
    "Grammar": "grammar",
    "Verdict": "grammar",
    "Report": "report",
    "Selection": "selecting",
    "select": "selecting",
}
__all__ = ["GRAMMAR", "Grammar", "Report", "Selection", "Verdict", "compile", "select"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    found = getattr(import_module(f"gnomon.grammar.{_HOMES[name]}"), name)
    globals()[name] = found
    return found
