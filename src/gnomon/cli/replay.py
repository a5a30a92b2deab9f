"""`gnomon replay`: generate again, and compare bit for bit."""

from __future__ import annotations

from dataclasses import asdict
from itertools import groupby

import typer

from gnomon.cli.common import print_json, print_table
from gnomon.errors import UsageError
from gnomon.ledger import Ledger, Replay, parse_age
from gnomon.ledger import replay as again
from gnomon.progress import progress

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def replay(
    id: str = typer.Argument("", help="The run's id, or its beginning."),
    everything: bool = typer.Option(False, "--all", help="Every run of the ledger."),
    since: str = typer.Option("", "--since", metavar="AGE", help="With --all: only younger ones (15m, 2h, 1d, 3w)."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Generate a run again and compare its tokens, its end and the checksums of its logits.

    Ends with code 1 when something differs, or was made with other numbers than this model has now.
    """
    from gnomon.loading import load

    ledger = Ledger()
    if bool(id) == everything:
        raise UsageError("Say what to replay: an id, or --all (with --since AGE).")
    runs = ledger.find(id) if id else ledger.runs(since=parse_age(since) if since else 0.0)
    runs.sort(key=lambda run: (run.reference, run.profile, run.created, run.id, run.choice))
    results: list[Replay] = []
    for (reference, profile), of_model in groupby(runs, key=lambda run: (run.reference, run.profile)):
        with load(reference, profile=profile, ledger=False) as model:
            groups = [list(group) for _, group in groupby(of_model, key=lambda run: run.id)]
            with progress(f"Replaying {reference}", len(groups)) as bar:
                for group in groups:
                    results += again(group, model)
                    bar.advance()
    if json:
        print_json([{"verdict": r.verdict, "detail": r.detail, "run": asdict(r.run)} for r in results])
    else:
        rows = [(r.run.id[:16], r.run.choice, len(r.run.token_ids), r.verdict, r.detail) for r in results]
        print_table(("ID", "CHOICE", "TOKENS", "VERDICT", ""), rows)
        print(f"{sum(r.ok for r in results)} of {len(results)} identical bit for bit")
    if not all(r.ok for r in results):
        raise typer.Exit(1)
