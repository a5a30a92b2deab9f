"""`gnomon embed`: texts to vectors, one JSON line each."""

from __future__ import annotations

import json as jsonlib
import sys

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command()
def embed(
    texts: list[str] = typer.Argument(
        None, metavar="TEXT...", help="Texts; none, or -: one per line of standard input."
    ),
    model: str = typer.Option("minilm-l6-v2", "--model", "-m", help="Model reference."),
    similarity: bool = typer.Option(False, "--similarity", help="Print the cosine of each pair instead."),
    json: bool = typer.Option(False, "--json", help="One JSON document instead of a line per text."),
) -> None:
    """Turn texts into vectors of length 1."""
    import gnomon
    from gnomon.cli.common import print_json, print_table, read_prompt

    many = texts if texts and texts != ["-"] else [line for line in read_prompt("-").splitlines() if line]
    with gnomon.load(model) as opened:
        vectors = opened.embed(many)
    if similarity:
        cosines = vectors @ vectors.T
        rows = [(f"{cosines[i, j]:.4f}", many[i], many[j]) for i in range(len(many)) for j in range(i + 1, len(many))]
        if json:
            print_json([{"cosine": float(c), "a": a, "b": b} for c, a, b in rows])
        else:
            print_table(("COSINE", "A", "B"), rows)
        return
    entries = [{"text": text, "embedding": row.tolist()} for text, row in zip(many, vectors, strict=True)]
    if json:
        print_json(entries)
        return
    for entry in entries:
        sys.stdout.write(jsonlib.dumps(entry, ensure_ascii=False) + "\n")
