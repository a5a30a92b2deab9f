"""`gnomon config`: what the settings are, where they come from, and the recipe's schema."""

from __future__ import annotations

from pathlib import Path

import typer

from gnomon.cli.common import print_json, print_table

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True)


@app.command()
def show(
    origin: bool = typer.Option(False, "--origin", help="Also where each value comes from."),
    recipe: Path = typer.Option(None, "--recipe", help="A recipe in place of ./gnomon.yaml."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """The settings in force: flags > GNOMON_* > ./gnomon.yaml > user config > defaults."""
    from gnomon.config import settings

    rows = settings(recipe_file=recipe).rows()
    secret = ("serve.api_key", "serve.admin_key")
    shown = [(row.key, "(set)" if row.key in secret and row.value else row.value, row.origin) for row in rows]
    if json:
        print_json([{"key": k, "value": v, **({"origin": o} if origin else {})} for k, v, o in shown])
    else:
        columns = ("KEY", "VALUE", "ORIGIN") if origin else ("KEY", "VALUE")
        print_table(columns, [row if origin else row[:2] for row in shown])


@app.command()
def schema() -> None:
    """The recipe's JSON Schema, installed capabilities included."""
    from gnomon.recipe import json_schema

    print_json(json_schema())


@app.command()
def check(recipe: Path = typer.Argument(..., help="A recipe file.")) -> None:
    """Check a recipe: unknown keys are named with their path and the nearest known one."""
    from gnomon.recipe import load_recipe

    load_recipe(recipe)
    print(f"{recipe}: ok")


@app.command()
def path() -> None:
    """Where the user's configuration file lies."""
    from gnomon.config import user_config_file

    print(user_config_file())
