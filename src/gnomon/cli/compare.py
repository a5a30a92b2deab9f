"""`gnomon compare`: models, merges and ensembles on the same texts and questions, with intervals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer

from gnomon.cli import common

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(context_settings={"max_content_width": 100})
def compare(
    refs: list[str] = typer.Argument(None, help="References: models, merges, ensembles (a+b).", show_default=False),
    text: Path = typer.Option(None, "--text", help="A text file; every paragraph is one text."),
    items: Path = typer.Option(None, "--items", help="A .jsonl file of question, A, B, ..., answer."),
    limit: int = typer.Option(None, "--limit", min=1, help="Only the first so many items."),
    plot: Path = typer.Option(None, "--plot", help="Write a picture (.svg)."),
    seed: int = typer.Option(0, "--seed", help="Of the bootstrap."),
    profile: str = typer.Option(None, "--profile", help="Numeric profile of all: fp32, bf16, int8 or gguf."),
    threads: int = typer.Option(None, "--threads", help="CPU threads."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Bits per byte and multiple-choice accuracy of each REF, with 95 % paired bootstrap intervals.

    \b
    gnomon compare smollm2-135m-instruct gemma-3-270m smollm2-135m-instruct+gemma-3-270m --text notes.txt
    gnomon compare base merged.yaml --items questions.jsonl --limit 200 --plot compare.svg
    """
    from gnomon.ensemble.check import SAMPLE
    from gnomon.ensemble.compare import compare as run_compare
    from gnomon.ensemble.compare import read_items, read_texts, svg
    from gnomon.ensemble.resolving import members_of
    from gnomon.errors import UsageError
    from gnomon.models.cache import atomic_write
    from gnomon.progress import progress

    if not refs:
        raise UsageError("Nothing to compare.", hint="Give model references.", param="refs")
    for path in (text, items):
        if path is not None and not path.is_file():
            raise UsageError(f"No file {path}.", param="text")
    texts = read_texts(text) if text else ([] if items else SAMPLE.splitlines(keepends=True))
    questions = read_items(items, limit) if items else []
    members = {str(member) for ref in refs for member in members_of(ref)[0]}
    with progress("Scoring", (len(texts) + len(questions)) * len(members)) as bar:
        report = run_compare(refs, texts, questions, seed=seed, advance=bar.advance, profile=profile, threads=threads)
    if plot is not None:
        with atomic_write(plot) as out:
            out.write(svg(report).encode())
    if json:
        common.print_json(report)
        return
    measures = [m for m in ("bits_per_byte", "accuracy") if m in report["rows"][0]]
    columns = [c for m in measures for c in (m.upper().replace("_", " "), "TO THE BEST")]
    rows = [
        [row["name"], *(_cell(row[key]) for m in measures for key in (m, f"{m}_to_best"))] for row in report["rows"]
    ]
    common.print_table(["REF", *columns], rows)


def _cell(interval: dict[str, Any]) -> str:
    return f"{interval['value']:.4f} [{interval['low']:.4f}, {interval['high']:.4f}]"
