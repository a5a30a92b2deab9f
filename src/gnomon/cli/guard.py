"""`gnomon guard`: scan a text, list the rules, test a policy."""

from __future__ import annotations

import sys
from pathlib import Path

import typer

from gnomon.cli.common import print_json, print_table
from gnomon.errors import Blocked, UsageError
from gnomon.guard.guard import Guard
from gnomon.guard.rules import pack, pack_names

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Check text: secrets, personal data, words, patterns. The same rules guard a stream (--guard, `guard:`).",
)
POLICY = typer.Option("", "--policy", "-p", help="A policy file, or names: secrets,pii. Default: secrets and pii.")
DIRECTION = typer.Option("output", "--direction", help="Which checks of the policy: input or output.")
JSON = typer.Option(False, "--json", help="As JSON.")


def _guard(policy: str) -> Guard:
    return Guard(policy or None)


@app.command()
def ls(json: bool = JSON) -> None:
    """The rule packs and their rules."""
    rows = [
        (name, rule.id, rule.entity, rule.help or rule.pattern[:60]) for name in pack_names() for rule in pack(name)
    ]
    if json:
        print_json([dict(zip(("pack", "rule", "entity", "about"), row, strict=True)) for row in rows])
        return
    print_table(("PACK", "RULE", "ENTITY", "ABOUT"), rows)


@app.command()
def scan(
    file: str = typer.Argument("-", help="A file, or - for standard input."),
    policy: str = POLICY,
    direction: str = DIRECTION,
    fail: bool = typer.Option(False, "--fail", help="Exit with 3 when anything but flags was found."),
    json: bool = JSON,
) -> None:
    """Print the text with what was found replaced; findings go to standard error."""
    if direction not in ("input", "output"):
        raise UsageError(f"--direction is input or output, not `{direction}`.", param="direction")
    raw = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    result = _guard(policy).scan(raw, direction)  # type: ignore[arg-type]
    if json:
        findings = [finding.as_dict() for finding in result.findings]
        print_json({"verdict": result.verdict, "risk": result.risk, "text": result.text, "findings": findings})
    else:
        sys.stdout.write(result.text)
        for finding in result.findings:
            print(finding, file=sys.stderr)
    if result.verdict == "block" or (fail and not result.valid):
        raise Blocked(f"Verdict: {result.verdict}.")


@app.command()
def check(policy: str = typer.Argument("", help="A policy file, or names: secrets,pii."), json: bool = JSON) -> None:
    """Compile a policy and show, per rule, what it does and how much text it may hold."""
    rows = _guard(policy).table()
    if json:
        print_json(rows)
        return
    shown = [
        (r["direction"], r["rule"], r["action"], ",".join(r["views"]), r["hold_chars"], r["on_overflow"] or "bounded")
        for r in rows
    ]
    print_table(("DIRECTION", "RULE", "ACTION", "VIEWS", "HOLDS", "ENDLESS"), shown)
