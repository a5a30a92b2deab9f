"""`gnomon pull`: fetch models of the zoo into the cache."""

from __future__ import annotations

import sys

import typer

from gnomon.cli.common import human_bytes, print_json

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def pull(
    names: list[str] = typer.Argument(None, metavar="NAME...", help="Zoo names; default: smollm2-135m-instruct."),
    accept_license: bool = typer.Option(False, "--accept-license", help="I have read and accept the model's licence."),
    verify: bool = typer.Option(False, "--verify", help="Rehash what is already there."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Fetch models; verified by sha256, restarted cleanly after an interruption, a no-op the second time."""
    from gnomon.models.fetch import pull as fetch
    from gnomon.models.zoo import DEFAULT_MODEL, zoo

    done = []
    for name in names or [DEFAULT_MODEL]:
        folder = fetch(name, accept_license=accept_license, verify=verify)
        done.append({"name": name, "path": str(folder), "bytes": zoo()[name].size})
        if not json:
            print(f"{name}: {human_bytes(zoo()[name].size)} in {folder}", file=sys.stderr)
    if json:
        print_json(done)
