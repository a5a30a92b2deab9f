"""mergekit-yaml's flags that gnomon has no use for: taken, so that commands people know run as they are, and told."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand

LAZY = "files are always read in parts"
CPU = "merging runs on the CPU"
OPENED = "adapters are applied as they are read; nothing is kept for them"
WRITING = "writing is not set apart: --threads counts all"
SWITCHES = {
    "lazy-unpickle": LAZY,
    "low-cpu-memory": "--max-memory keeps a limit",
    "allow-crimes": "what has equal tensors merges, whatever its architecture is called; nothing else does",
    "trust-remote-code": "no model's code is ever run",
    "safe-serialization": "only safetensors are written",
    "write-model-card": "no card is written: gnomon_merge.json says what was merged",
    "clone-tensors": "each tensor is written once",
    "async-write": WRITING,
    "cuda": CPU,
    "read-to-gpu": CPU,
    "multi-gpu": CPU,
    "gpu-rich": CPU,
}
VALUED = {
    "device": CPU,
    "transformers-cache": "gnomon keeps its own cache",
    "lora-merge-cache": OPENED,
    "lora-merge-dtype": OPENED,
    "write-threads": WRITING,
}


class TakesMergekitFlags(TyperCommand):
    """A command that takes mergekit-yaml's other flags too, with one note for each."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, without_mergekit_flags(args))


def without_mergekit_flags(args: list[str]) -> list[str]:
    """The arguments without those flags (and their values); each is told on standard error."""
    kept: list[str] = []
    rest = iter(args)
    for argument in rest:
        name, equals, _ = argument.removeprefix("--").partition("=")
        positive = name.removeprefix("no-")
        if argument.startswith("--") and name in VALUED:
            if not equals:
                next(rest, None)
            _tell(argument, VALUED[name])
        elif argument.startswith("--") and positive in SWITCHES and not equals:
            _tell(argument, SWITCHES[positive])
        else:
            kept.append(argument)
    return kept


def _tell(argument: str, why: str) -> None:
    from gnomon.progress import is_quiet

    if not is_quiet():
        typer.echo(f"note: mergekit's {argument} changes nothing here: {why}.", err=True)
