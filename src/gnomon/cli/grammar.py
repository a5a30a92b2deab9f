"""`gnomon grammar`: what becomes of each keyword of a schema, and whether a text is accepted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from gnomon.cli import common

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
SOURCE = typer.Argument(metavar="FILE", help="A schema (.json), a grammar (.lark, .gbnf, .ebnf) or choices (.txt).")


@app.callback()
def group() -> None:
    """Grammars: check what is enforced, judge texts, show the shortest one.

    \b
    gnomon grammar check schema.json
    gnomon grammar accepts schema.json answer.json
    gnomon grammar shortest grammar.lark
    """


@app.command()
def check(file: str = SOURCE, json: bool = typer.Option(False, "--json", help="The report as JSON.")) -> None:
    """What becomes of each keyword: enforced by the mask, validated afterwards, or no constraint."""
    grammar = _compile(file)
    report = grammar.report
    if json:
        common.print_json(report.as_dict())
        return
    counts = report.as_dict()["counts"]
    rows = [[entry.path, entry.keyword, entry.status, entry.note] for entry in report]
    if rows:
        common.print_table(["where", "keyword", "what becomes of it", "why"], rows)
    if report.unsatisfiable:
        print("No text satisfies this grammar: generation with it is refused.")
    elif rows:
        print(", ".join(f"{count} {status}" for status, count in counts.items() if count) + f" ({report.route})")
    else:
        print(f"The {report.kind} grammar is enforced by the mask as a whole.")
    for warning in report.warnings:
        print(f"Note: {warning}")


@app.command()
def accepts(
    file: str = SOURCE,
    text: str | None = typer.Argument(None, help="The text, a file that holds it, or - for standard input."),
    as_generated: bool = typer.Option(False, help="Only what decoding itself would write."),
) -> None:
    """Whether a text is accepted; exit code 1 and the reason when it is not."""
    grammar = _compile(file)
    content = _text(text)
    verdict = (
        grammar.accepts(content, whitespace="as_generated", any_order=False)
        if as_generated
        else grammar.accepts(content)
    )
    if verdict:
        print("accepted")
        return
    where = f" at character {verdict.position}" if verdict.position is not None else ""
    print(f"not accepted{where}: {verdict.reason}")
    raise typer.Exit(1)


@app.command()
def shortest(file: str = SOURCE) -> None:
    """A shortest text that the grammar accepts."""
    print(_compile(file).shortest())


def _compile(file: str) -> Any:
    from gnomon.grammar.options import GrammarOptions, parse_text

    return GrammarOptions.model_validate(parse_text(file)).grammar()


def _text(given: str | None) -> str:
    if given is None or given == "-":
        return sys.stdin.read().removesuffix("\n")
    path = Path(given)
    return path.read_text(encoding="utf-8").removesuffix("\n") if path.suffix and path.is_file() else given
