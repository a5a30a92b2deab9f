"""`gnomon rm`: remove fetched models."""

from __future__ import annotations

import shutil
import sys

import typer

from gnomon.errors import ModelNotFound

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def rm(names: list[str] = typer.Argument(..., metavar="NAME...", help="Zoo names.")) -> None:
    """Remove fetched models from the cache."""
    from gnomon.models.cache import models_dir
    from gnomon.models.zoo import zoo

    for name in names:
        folder = models_dir() / name
        if name not in zoo() or not folder.is_dir():
            raise ModelNotFound(f"`{name}` is not in the cache.", hint="`gnomon ls` lists what is.")
        shutil.rmtree(folder)
        print(f"Removed {name}.", file=sys.stderr)
