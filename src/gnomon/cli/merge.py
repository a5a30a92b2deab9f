"""`gnomon merge`: merge models as a merge file says. Thin: parses flags, prints what `gnomon.merge` gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from gnomon.cli.common import human_bytes, print_json, print_table


class RunByDefault(TyperGroup):
    """`gnomon merge FILE OUT` is `gnomon merge run FILE OUT`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args and args[0] not in self.commands:
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
FILE = typer.Argument(..., metavar="FILE", help="A merge file (YAML in mergekit's format).")
JSON = typer.Option(False, "--json", help="As JSON.")
SEED = typer.Option(0, "--seed", "--random-seed", help="Seed of DARE's and DELLA's random drops.")
COMPAT = typer.Option(False, "--compat/--no-compat", help="mergekit's own dtypes and torch generator, side by side.")
THREADS = typer.Option(0, "--threads", "-j", help="CPU threads; 0: all. The result does not depend on it.")
TRUNCATE = typer.Option(False, "--unsafe-truncate-embeddings", help="Cut tables of unequal vocabularies to the least.")
NONFINITE = typer.Option(False, "--allow-nonfinite", help="Merge NaN and infinity as they are.")
MEMORY = typer.Option(None, "--max-memory", metavar="SIZE", help="Most memory to use, as 2GB; kept, or refused before.")
SHARD = typer.Option("5B", "--out-shard-size", metavar="SIZE", help="Largest output file (5B is 5 * 10^9 bytes).")


def _open(file: Path, **run: Any) -> Any:
    from gnomon.merge.build import MergeRun, open_merge

    return open_merge(file, MergeRun(**run))


def _warn(warnings: Any) -> None:
    for warning in warnings:
        typer.echo(f"note: {warning}", err=True)


@app.command()
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
    from gnomon.merge.writer import write

    merged = _open(
        file,
        seed=seed,
        compat=compat,
        threads=threads,
        truncate_embeddings=unsafe_truncate_embeddings,
        allow_nonfinite=allow_nonfinite,
    )
    _warn(merged.plan.warnings)
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
    _warn(merged.plan.warnings)
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
        ("time", f"about {found.seconds:.0f} s here"),
    ]
    print_table(("", ""), rows)
    if tensors:
        shown = [(t["name"], "x".join(map(str, t["shape"])), t["dtype"], t["method"], t["parameters"]) for t in listed]
        print_table(("TENSOR", "SHAPE", "DTYPE", "METHOD", "PARAMETERS"), shown)


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
    from gnomon.merge.report import write_html

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
    from gnomon.merge.sweep import parse_sweep
    from gnomon.merge.sweep import plot as draw
    from gnomon.merge.sweep import sweep as run_sweep

    name, values = parse_sweep(sweep)
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
) -> None:
    """Merge bare tensor files (.safetensors, .bin, .pt) into one safetensors file."""
    from gnomon.merge.build import MergeRun
    from gnomon.merge.raw import merge_raw, write_raw

    merged = merge_raw(file, MergeRun(seed=seed, compat=compat, threads=threads))
    _warn(merged.plan.warnings)
    print(f"{write_raw(merged, out)}: {len(merged)} tensors, identity {merged.identity}")


@app.command()
def multi(
    file: Path = FILE,
    out: Path = typer.Argument(..., metavar="OUT", help="The model directory to make of the last document."),
    intermediate_dir: Path = typer.Option(..., "--intermediate-dir", "-I", help="Where the named documents go."),
    max_memory: str = MEMORY,
    out_shard_size: str = SHARD,
    seed: int = SEED,
    compat: bool = COMPAT,
    threads: int = THREADS,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace directories that hold something else."),
) -> None:
    """Write every document of a file, the named ones too. `run` gives the same result without writing those."""
    from gnomon.merge.build import MergeRun
    from gnomon.merge.multi import write_all

    run_ = MergeRun(seed=seed, compat=compat, threads=threads)
    for name, written in write_all(
        file, out, intermediate_dir, run_, max_memory=max_memory, shard_bytes=out_shard_size, overwrite=overwrite
    ):
        print(f"{name}: {written.path}, {written.tensors} tensors, {human_bytes(written.bytes)}")


@app.command()
def moe(
    file: Path = typer.Argument(..., metavar="FILE", help="base_model and experts, in mergekit-moe's format."),
    out: Path = typer.Argument(..., metavar="OUT", help="The model directory to make."),
    max_memory: str = MEMORY,
    out_shard_size: str = SHARD,
    seed: int = typer.Option(0, "--seed", help="Of the random gate modes."),
    threads: int = THREADS,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT when it holds something else."),
    json: bool = JSON,
) -> None:
    """A mixture of experts (Mixtral) from dense Llama or Mistral models.

    Mixtral is none of gnomon's own networks: here it runs through transformers, slower.
    """
    from gnomon.merge.moe import open_moe
    from gnomon.merge.writer import write

    merged = open_moe(file, seed=seed, threads=threads)
    _warn(merged.plan.warnings)
    written = write(merged, out, max_memory=max_memory, shard_bytes=out_shard_size, overwrite=overwrite)
    if json:
        print_json({key: str(value) if key == "path" else value for key, value in vars(written).items()})
        return
    experts = merged.config["num_local_experts"]
    print(f"{written.path}: {experts} experts, {written.tensors} tensors, {human_bytes(written.bytes)}")
    print("It is a Mixtral: gnomon runs it through transformers, slower than its own networks.")


@app.command()
def evolve(
    file: Path = FILE,
    text: list[Path] = typer.Option(..., "--text", help="A text to be good at; give one per task."),
    out: Path = typer.Option(..., "--out", metavar="FILE", help="The merge file to write, with the best parameters."),
    genes: list[str] = typer.Option(["weight"], "--gene", help="A parameter to search: weight, density, t or lambda."),
    layer_group: int = typer.Option(None, "--layer-group", help="One value per so many layers; default: one for all."),
    budget: int = typer.Option(60, "--budget", min=2, help="How many merges to try."),
    tokens: int = typer.Option(1000, "--tokens", help="How many tokens of each half of a text."),
    seed: int = SEED,
    threads: int = THREADS,
    json: bool = JSON,
) -> None:
    """Search a merge's parameters by CMA-ES on the first halves of texts; told on the second ones (extra `evolve`)."""
    import yaml

    from gnomon.merge.evolve import evolve as search
    from gnomon.merge.perplexity import read_text

    texts = {path.stem: read_text(path) for path in text}
    found = search(
        file, texts, genes=genes, layer_group=layer_group, budget=budget, seed=seed, most_tokens=tokens, threads=threads
    )
    out.write_text(yaml.safe_dump(found.content, sort_keys=False), encoding="utf-8")
    if json:
        print_json(vars(found))
        return
    rows = [("searched on", *found.seen), ("held out", *found.held_out)]
    print_table(("LOSS", "BEFORE", "AFTER"), [(name, f"{a:.4f}", f"{b:.4f}") for name, a, b in rows])
    print(f"{out}: the best of {found.evaluations} merges")


@app.command()
def transplant(
    model: str = typer.Argument(..., metavar="MODEL", help="The model whose body stays."),
    donor: str = typer.Argument(..., metavar="DONOR", help="The model whose tokenizer it gets."),
    out: Path = typer.Argument(..., metavar="OUT", help="The model directory to make."),
    atoms: int = typer.Option(64, "--atoms", "-k", help="Most known tokens that a new token's row is made of."),
    method: str = typer.Option("omp", "--method", help="omp (from the donor's table), mean or zero."),
    max_memory: str = MEMORY,
    out_shard_size: str = SHARD,
    threads: int = THREADS,
    overwrite: bool = typer.Option(False, "--overwrite", help="Replace OUT when it holds something else."),
    json: bool = JSON,
) -> None:
    """Another model's tokenizer for a model: rows of common tokens stay, others are combined from them."""
    from gnomon.loading import open_reference
    from gnomon.merge.transplant import transplant as make
    from gnomon.merge.writer import write

    made = make(open_reference(model), open_reference(donor), atoms=atoms, method=method, threads=threads)
    written = write(made, out, max_memory=max_memory, shard_bytes=out_shard_size, overwrite=overwrite)
    if json:
        print_json({key: str(value) if key == "path" else value for key, value in vars(written).items()})
        return
    print(f"{written.path}: {made.plan.warnings[0]}")


@app.command("lora-extract")
def lora_extract(
    base: str = typer.Argument(..., metavar="BASE", help="The base model."),
    tuned: str = typer.Argument(..., metavar="MODEL", help="The fine-tuned model."),
    out: Path = typer.Argument(..., metavar="OUT", help="The PEFT LoRA directory to make."),
    max_rank: int = typer.Option(128, "--max-rank", help="Largest rank of a module."),
    energy: float = typer.Option(None, "--energy", help="As few ranks as keep this share of the squared norm, 0 to 1."),
    include: str = typer.Option(None, "--include", help="Only modules whose name this pattern finds."),
    exclude: str = typer.Option(None, "--exclude", help="No modules whose name this pattern finds."),
) -> None:
    """The difference of two models as a LoRA adapter (PEFT), by singular values; says what it could not hold."""
    from gnomon.loading import open_reference
    from gnomon.merge.extract import extract_lora

    found = extract_lora(
        open_reference(base), open_reference(tuned), out, max_rank=max_rank, energy=energy, include=include,
        exclude=exclude,
    )  # fmt: skip
    _warn(f"`{name}` changes but is no linear module: left out" for name in found.left_out)
    kept = f"{found.kept:.2%} of the difference (squared norm)"
    print(f"{out}: {found.modules} modules, largest rank {found.rank}, holds {kept}")
