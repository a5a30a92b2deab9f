"""`gnomon completion`: the script that a shell sources to complete our commands and flags."""

from __future__ import annotations

import typer
from click.shell_completion import get_completion_class

from gnomon.errors import UsageError

app = typer.Typer()


@app.command()
def completion(shell: str = typer.Argument(..., help="bash, zsh or fish.")) -> None:
    """Print shell completion: eval "$(gnomon completion bash)"."""
    from gnomon.cli.main import cli

    kind = get_completion_class(shell)
    if kind is None:
        raise UsageError(f"Unknown shell `{shell}`.", hint="Known: bash, zsh, fish.")
    print(kind(cli, {}, "gnomon", "_GNOMON_COMPLETE").source())
