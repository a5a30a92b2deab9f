"""`gnomon completion`: the script that a shell sources to complete our commands and flags."""

from __future__ import annotations

import typer
from typer.completion import get_completion_script  # type: ignore[attr-defined]

from gnomon.errors import UsageError

app = typer.Typer(add_completion=False, rich_markup_mode=None)
SHELLS = ("bash", "zsh", "fish")


@app.command()
def completion(shell: str = typer.Argument(..., help="bash, zsh or fish.")) -> None:
    """Print shell completion: eval "$(gnomon completion bash)"."""
    if shell not in SHELLS:
        raise UsageError(f"Unknown shell `{shell}`.", hint=f"Known: {', '.join(SHELLS)}.")
    print(get_completion_script(prog_name="gnomon", complete_var="_GNOMON_COMPLETE", shell=shell))
