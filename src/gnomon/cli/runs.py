"""`gnomon runs`: the ledger of what was generated."""

from __future__ import annotations

import time
from dataclasses import asdict

import typer

from gnomon.cli.common import print_json, print_table
from gnomon.errors import UsageError
from gnomon.ledger import Ledger, parse_age

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)
SHOWN_ID, SHOWN_TEXT = 16, 48


@app.command()
def ls(
    since: str = typer.Option("", "--since", metavar="AGE", help="Only younger ones: 15m, 2h, 1d, 3w."),
    limit: int = typer.Option(20, "--limit", "-n", min=1, help="At most so many."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """The latest runs, newest first."""
    runs = Ledger().runs(since=parse_age(since) if since else 0.0, limit=limit)
    if json:
        print_json([asdict(run) for run in runs])
        return
    if not runs:
        print("No runs in the ledger.")
        return
    rows = [
        (
            run.id[:SHOWN_ID] + (f"/{run.choice}" if run.choice else ""),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.created)),
            f"{run.model} {run.profile}",
            len(run.token_ids),
            " ".join(run.text.split())[:SHOWN_TEXT],
        )
        for run in runs
    ]
    print_table(("ID", "WHEN", "MODEL", "TOKENS", "TEXT"), rows)


@app.command()
def show(
    id: str = typer.Argument(..., help="The id, or its beginning."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Everything the ledger knows of a run."""
    runs = Ledger().find(id)
    if json:
        print_json([asdict(run) for run in runs])
        return
    for run in runs:
        facts = {k: v for k, v in asdict(run).items() if k not in ("prompt_ids", "token_ids", "text", "created")}
        facts["created"] = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.created))
        facts["tokens"] = f"{len(run.prompt_ids)} of the prompt, {len(run.token_ids)} drawn"
        print_table(("", ""), list(facts.items()))
        print(run.text)


@app.command()
def rm(
    id: str = typer.Argument("", help="The id, or its beginning."),
    before: str = typer.Option("", "--before", metavar="AGE", help="Everything older: 30d."),
    everything: bool = typer.Option(False, "--all", help="Everything."),
) -> None:
    """Delete a run, or old ones, or all."""
    if sum((bool(id), bool(before), everything)) != 1:
        raise UsageError("Say what to delete: an id, --before AGE, or --all.")
    ledger = Ledger()
    if id:
        count = ledger.remove(id=ledger.find(id)[0].id)
    else:
        count = ledger.remove(before=parse_age(before) if before else time.time() + 1)
    print(f"{count} deleted")
