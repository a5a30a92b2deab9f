"""Flags that the commands under `gnomon merge` share, and how they tell warnings."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

FILE = typer.Argument(..., metavar="FILE", help="A merge file (YAML in mergekit's format).")
JSON = typer.Option(False, "--json", help="As JSON.")
SEED = typer.Option(0, "--seed", "--random-seed", help="Seed of DARE's and DELLA's random drops.")
COMPAT = typer.Option(False, "--compat/--no-compat", help="mergekit's own dtypes and torch generator, side by side.")
THREADS = typer.Option(
    0, "--threads", "--num-threads", "-j", min=0, help="CPU threads; 0: all. The result does not depend on it."
)
TRUNCATE = typer.Option(False, "--unsafe-truncate-embeddings", help="Cut tables of unequal vocabularies to the least.")
NONFINITE = typer.Option(False, "--allow-nonfinite", help="Merge NaN and infinity as they are.")
MEMORY = typer.Option(None, "--max-memory", metavar="SIZE", help="Most memory to use, as 2GB; kept, or refused before.")
SHARD = typer.Option("5B", "--out-shard-size", metavar="SIZE", help="Largest output file (5B is 5 * 10^9 bytes).")


def warn(warnings: Iterable[str]) -> None:
    from gnomon.progress import is_quiet

    for warning in warnings if not is_quiet() else ():
        typer.echo(f"note: {warning}", err=True)


@contextmanager
def told_to_go_on(out: Path) -> Iterator[None]:
    """On Ctrl-C, say where the finished part lies."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"Stopped. {out}.partial keeps what is done; the same command goes on from there.", err=True)
        raise
