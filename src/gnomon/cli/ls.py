"""`gnomon ls`: the models in the cache, or the whole zoo."""

from __future__ import annotations

import typer

from gnomon.cli.common import human_bytes, print_json, print_table

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def ls(
    all_: bool = typer.Option(False, "--all", "-a", help="Also the zoo's models that are not fetched yet."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """List models."""
    from gnomon.models.cache import models_dir
    from gnomon.models.fetch import is_complete
    from gnomon.models.zoo import zoo

    rows = [
        {
            "name": entry.name,
            "fetched": is_complete(entry, models_dir() / entry.name),
            "bytes": entry.size,
            "kind": entry.kind,
            "context": entry.context,
            "licence": entry.licence,
            "summary": entry.summary,
        }
        for entry in zoo().values()
    ]
    shown = [row for row in rows if all_ or row["fetched"]]
    if json:
        print_json(shown)
        return
    columns = ("NAME", "SIZE", "CONTEXT", "LICENCE", "FETCHED", "WHAT")
    print_table(
        columns,
        [
            (
                r["name"],
                human_bytes(float(str(r["bytes"]))),
                r["context"],
                r["licence"],
                "yes" if r["fetched"] else "no",
                r["summary"],
            )
            for r in shown
        ],
    )
    if not shown:
        typer.echo(
            "No model is fetched yet. `gnomon ls --all` lists the zoo; `gnomon pull` fetches the default.", err=True
        )
