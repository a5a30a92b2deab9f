"""`gnomon version`."""

from __future__ import annotations

import typer

from gnomon.cli.common import print_json
from gnomon.version import __version__

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def version(json: bool = typer.Option(False, "--json", help="As JSON.")) -> None:
    """The version."""
    if json:
        print_json({"gnomon": __version__})
    else:
        print(__version__)
