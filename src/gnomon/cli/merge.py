"""`gnomon merge`: merge models as a merge file says. Thin: parses flags, prints what `gnomon.merge` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from gnomon.cli import merge_making
from gnomon.cli.common import human_bytes, print_json, print_table
from gnomon.cli.merge_options import (
    COMPAT,
    FILE,
    JSON,
    MEMORY,
    NONFINITE,
    SEED,
    SHARD,
    THREADS,
    TRUNCATE,
    told_to_go_on,
    warn,
)
from gnomon.cli.mergekit_flags import TakesMergekitFlags

MERGEKIT = (
    "mergekit-yaml's other flags (--lazy-unpickle, --allow-crimes, --cuda, ...) are taken, and told to change nothing."
)


class RunByDefault(TyperGroup):
    """`gnomon merge FILE OUT` is `gnomon merge run FILE OUT`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands and (Path(args[0]).suffix or Path(args[0]).exists()):
            args = ["run", *args]
        return super().resolve_command(ctx, args)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Merge models: mergekit's files, in bounded memory. `gnomon merge FILE OUT` runs one.\n\n"
    "A merge file is a model reference too: gnomon serve merge.yaml, gnomon.load('merge.yaml').",
)


def _open(file: Path, **run: Any) -> Any:
    from gnomon.merge.build import MergeRun, open_merge

    return open_merge(file, MergeRun(**run))


@app.command(cls=TakesMergekitFlags, epilog=MERGEKIT)
def run(
    file: Path = FILE,
    out: Path = typer.Argument(..., metavar="OUT", help="The model directory to make."),
    max_memory: str = MEMORY,
    out_shard_size: str = SHARD,
    seed: int = SEED,
    compat: bool = COMPAT,
    threads: int = THREADS,
    copy_tokenizer: bool = typer.Option(True, "--copy-tokenizer/--no-copy-tokenizer", help="Write a tokenizer too."),
    unsafe_truncate_embeddings: bool = TRUNCATE,
    allow_nonfinite: bool = NONFINITE,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT when it holds something else."),
    json: bool = JSON,
) -> None:
    """Merge and write a model directory: streamed, resumable, whole or not at all.

    A killed run leaves OUT.partial; the same command goes on where it stopped and gives the same bytes.
    """
    from gnomon.merge.check import strangers
    from gnomon.merge.writer import write

    merged = _open(
        file,
        seed=seed,
        compat=compat,
        threads=threads,
        truncate_embeddings=unsafe_truncate_embeddings,
        allow_nonfinite=allow_nonfinite,
    )
    warn(merged.plan.warnings)
    warn(strangers(merged))
    with told_to_go_on(out):
        written = write(
            merged,
            out,
            max_memory=max_memory,
            shard_bytes=out_shard_size,
            overwrite=overwrite,
            copy_tokenizer=copy_tokenizer,
        )
    if json:
        print_json({key: str(value) if key == "path" else value for key, value in vars(written).items()})
        return
    again = f", {written.resumed} of them from an earlier run" if written.resumed else ""
    print(f"{written.path}: {written.tensors} tensors{again}, {human_bytes(written.bytes)}, {written.seconds:.1f} s")
    print(f"identity {written.identity}")


@app.command()
def plan(
    file: Path = FILE,
    max_memory: str = MEMORY,
    out_shard_size: str = SHARD,
    threads: int = THREADS,
    unsafe_truncate_embeddings: bool = TRUNCATE,
    tensors: bool = typer.Option(False, "--tensors", help="List every tensor."),
    json: bool = JSON,
) -> None:
    """What a merge will read, write and need, from file headers, or from config.json alone where no weights are."""
    from gnomon.merge.forecast import forecast

    merged = _open(file, threads=threads, truncate_embeddings=unsafe_truncate_embeddings, bare=True)
    found = forecast(merged, max_memory=max_memory, shard_bytes=out_shard_size)
    warn(merged.plan.warnings)
    listed = [
        {"name": t.name, "shape": list(t.shape), "dtype": t.dtype, "method": t.method or "copy",
         "sources": [[s.model, s.tensor] for s in t.sources], "parameters": dict(t.parameters)}
        for t in merged.plan.tensors
    ]  # fmt: skip
    if json:
        print_json({**vars(found), **({"list": listed} if tensors else {})})
        return
    rows = [
        ("tensors", found.tensors),
        ("bytes read", human_bytes(found.bytes_read)),
        ("bytes written", human_bytes(found.bytes_written)),
        ("files written", found.files),
        ("peak memory", f"{human_bytes(found.peak_memory)} (at `{found.worst_tensor}`)"),
        ("threads", found.threads),
        ("time", f"about {_duration(found.seconds)} here"),
    ]
    print_table(("", ""), rows)
    if tensors:
        shown = [(t["name"], "x".join(map(str, t["shape"])), t["dtype"], t["method"], t["parameters"]) for t in listed]
        print_table(("TENSOR", "SHAPE", "DTYPE", "METHOD", "PARAMETERS"), shown)


def _duration(seconds: float) -> str:
    """1 s, 12 min, 3.5 h."""
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@app.command()
def methods(json: bool = JSON) -> None:
    """The merge methods and their parameters."""
    from gnomon.merge.registry import REQUIRED
    from gnomon.merge.registry import methods as known

    rows = []
    for method in known().values():
        parameters = {
            p.name: {"type": p.kind.__name__, "per_model": p.per_model}
            | ({} if p.default is REQUIRED else {"default": p.default})
            for p in method.parameters.values()
        }
        facts = {"name": method.name, "base": method.base, "parameters": parameters, "help": method.help}
        rows.append({**facts, "reference": method.reference})
    if json:
        print_json(rows)
        return
    print_table(
        ("METHOD", "BASE", "PARAMETERS", ""),
        [(r["name"], r["base"], ", ".join(r["parameters"]), r["help"]) for r in rows],
    )


@app.command()
def check(
    file: Path = FILE,
    threads: int = THREADS,
    unsafe_truncate_embeddings: bool = TRUNCATE,
    json: bool = JSON,
) -> None:
    """Will this merge make sense? Networks, vocabularies, templates, distances, sign conflicts, with reasons.

    Exit code 1 when it cannot be done.
    """
    from dataclasses import asdict

    from gnomon.merge.build import MergeRun
    from gnomon.merge.check import check as look

    found = look(file, MergeRun(threads=threads, truncate_embeddings=unsafe_truncate_embeddings))
    if json:
        print_json(asdict(found) | {"ok": found.ok})
    else:
        rows = [(f.level, f.what, f.advice) for f in found.findings]
        rows += [("distance", f"{name}: {far:.4f} of the base's norm", None) for name, far in found.distances.items()]
        rows += [("cosine", f"{pair}: {value:.3f}", None) for pair, value in found.cosines.items()]
        if found.sign_conflicts is not None:
            rows.append(("signs", f"{found.sign_conflicts:.1%} of the parameters change in opposite directions", None))
        print_table(("", "FOUND", "ADVICE"), rows)
        print("The merge can be done." if found.ok else "The merge cannot be done as it is.")
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def report(
    file: Path = FILE,
    model: Path = typer.Option(None, "--model", help="The written model; default: what it would be is computed."),
    text: Path = typer.Option(None, "--text", help="A text on which inputs and result are measured."),
    tokens: int = typer.Option(2000, "--tokens", help="How many tokens of it."),
    html: Path = typer.Option(None, "--html", help="Write one self-contained page here."),
    seed: int = SEED,
    threads: int = THREADS,
    json: bool = JSON,
) -> None:
    """What came of a merge: per layer norms, cosines, sign conflicts, NaN; perplexities before and after."""
    from gnomon.loading import open_reference
    from gnomon.merge.perplexity import read_text
    from gnomon.merge.report import report as make
    from gnomon.merge.report_page import write_html

    merged = _open(file, seed=seed, threads=threads, allow_nonfinite=True)
    result = open_reference(model) if model is not None else None
    found = make(merged, result=result, text=read_text(text) if text else None, most_tokens=tokens)
    if html is not None:
        write_html(found, html)
    if json:
        print_json(found.to_dict())
        return
    names = list(found.whole.relative)
    rows = [
        (g.name, *(f"{g.relative[n]:.4f}" for n in names), *(f"{g.cosine[n]:.3f}" for n in names[:-1]),
         f"{g.sign_conflicts:.1%}", g.nonfinite)
        for g in [*found.groups, found.whole]
    ]  # fmt: skip
    print_table(("", *names, *(f"cos {n}" for n in names[:-1]), "CONFLICTS", "NOT FINITE"), rows)
    if found.perplexity:
        print_table(("MODEL", "PERPLEXITY"), [(n, f"{value:.3f}") for n, value in found.perplexity.items()])


@app.command()
def sweep(
    file: Path = FILE,
    sweep: str = typer.Option(..., "--sweep", metavar="NAME=FROM:TO:STEP", help="As weight=0:1:0.1 or lambda=0.5,1."),
    text: list[Path] = typer.Option(..., "--text", help="A text to measure on; give one per task."),
    tokens: int = typer.Option(2000, "--tokens", help="How many tokens of each."),
    plot: Path = typer.Option(None, "--plot", help="Draw the curves here (PNG or SVG; extra `plot`)."),
    seed: int = SEED,
    threads: int = THREADS,
    json: bool = JSON,
) -> None:
    """Merge in memory for each value of a parameter and measure each on texts; the best is marked."""
    from dataclasses import asdict

    from gnomon.merge.build import MergeRun
    from gnomon.merge.perplexity import read_text
    from gnomon.merge.sweep import parse_sweep, require_plotting
    from gnomon.merge.sweep import plot as draw
    from gnomon.merge.sweep import sweep as run_sweep

    name, values = parse_sweep(sweep)
    if plot is not None:
        require_plotting(plot)
    texts = {path.stem: read_text(path) for path in text}
    found = run_sweep(file, name, values, texts, run=MergeRun(seed=seed, threads=threads), most_tokens=tokens)
    if plot is not None:
        draw(found, plot)
    if json:
        print_json(asdict(found) | {"best": found.best.value})
        return
    rows = [
        (f"{p.value:g}", *(f"{p.losses[n]:.4f}" for n in texts), f"{p.mean:.4f}", "best" if p is found.best else "")
        for p in found.points
    ]
    print_table((name.upper(), *texts, "MEAN", ""), rows)


@app.command()
def raw(
    file: Path = FILE,
    out: Path = typer.Argument(..., metavar="OUT", help="The safetensors file to make."),
    seed: int = SEED,
    compat: bool = COMPAT,
    threads: int = THREADS,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT when it is something else."),
    json: bool = JSON,
) -> None:
    """Merge bare tensor files (.safetensors, .bin, .pt) into one safetensors file."""
    from gnomon.merge.build import MergeRun
    from gnomon.merge.raw import merge_raw, write_raw

    merged = merge_raw(file, MergeRun(seed=seed, compat=compat, threads=threads))
    warn(merged.plan.warnings)
    write_raw(merged, out, overwrite=overwrite)
    if json:
        print_json({"path": str(out), "tensors": len(merged), "identity": merged.identity})
        return
    print(f"{out}: {len(merged)} tensors, identity {merged.identity}")


app.add_typer(merge_making.app)
