"""`gnomon merge multi|moe|evolve|transplant|lora-extract`: what is made of models otherwise. Thin."""

from __future__ import annotations

from pathlib import Path

import typer

from gnomon.cli.common import human_bytes, print_json, print_table
from gnomon.cli.merge_options import COMPAT, FILE, JSON, MEMORY, SEED, SHARD, THREADS, told_to_go_on, warn
from gnomon.cli.mergekit_flags import TakesMergekitFlags

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(cls=TakesMergekitFlags)
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
    json: bool = JSON,
) -> None:
    """Write every document of a file, the named ones too. `run` gives the same result without writing those."""
    from gnomon.merge.build import MergeRun
    from gnomon.merge.multi import write_all

    run_ = MergeRun(seed=seed, compat=compat, threads=threads)
    rows = []
    for name, written in write_all(
        file, out, intermediate_dir, run_, max_memory=max_memory, shard_bytes=out_shard_size, overwrite=overwrite
    ):
        rows.append({"name": name, **vars(written), "path": str(written.path)})
        if not json:
            print(f"{name}: {written.path}, {written.tensors} tensors, {human_bytes(written.bytes)}")
    if json:
        print_json(rows)


@app.command(cls=TakesMergekitFlags)
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
    """A mixture of experts from dense models: Mixtral, DeepSeek-MoE, Qwen2-MoE with a shared expert, or Qwen3-MoE.

    None of these is one of gnomon's own networks: here they run through transformers, slower.
    """
    from gnomon.merge.moe import open_moe
    from gnomon.merge.writer import write

    merged = open_moe(file, seed=seed, threads=threads)
    warn(merged.plan.warnings)
    with told_to_go_on(out):
        written = write(merged, out, max_memory=max_memory, shard_bytes=out_shard_size, overwrite=overwrite)
    if json:
        print_json({key: str(value) if key == "path" else value for key, value in vars(written).items()})
        return
    print(f"{written.path}: a {merged.config['model_type']}, {written.tensors} tensors, {human_bytes(written.bytes)}")


@app.command()
def evolve(
    file: Path = FILE,
    text: list[Path] = typer.Option(..., "--text", help="A text to be good at; give one per task."),
    out: Path = typer.Option(..., "--out", metavar="FILE", help="The merge file to write, with the best parameters."),
    genes: list[str] = typer.Option(["weight"], "--gene", help="A parameter to search: weight, density, t or lambda."),
    layer_group: int = typer.Option(None, "--layer-group", help="One value per so many layers; default: one for all."),
    budget: int = typer.Option(60, "--budget", min=2, help="How many merges to try."),
    tokens: int = typer.Option(1000, "--tokens", help="How many tokens of each half of a text."),
    seed: int = typer.Option(0, "--seed", "--random-seed", help="Of the search, and of random drops."),
    ray: str = typer.Option(None, "--ray", metavar="ADDRESS", help="Merges at once on a Ray cluster: local, auto, ..."),
    threads: int = THREADS,
    json: bool = JSON,
) -> None:
    """Search a merge's parameters by CMA-ES on the first halves of texts; told on the second ones (extra `evolve`).

    A stopped search leaves OUT.partial; the same command goes on from there and finds the same.
    """
    import yaml

    from gnomon.merge.evolve import evolve as search
    from gnomon.merge.perplexity import read_text

    texts = {path.stem: read_text(path) for path in text}
    out.parent.mkdir(parents=True, exist_ok=True)  # before the search, not after it
    journal = out.with_name(f"{out.name}.partial")
    with told_to_go_on(out):
        found = search(
            file, texts, genes=genes, layer_group=layer_group, budget=budget, seed=seed, most_tokens=tokens,
            threads=threads, journal=journal, ray=ray,
        )  # fmt: skip
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
    with told_to_go_on(out):
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
    json: bool = JSON,
) -> None:
    """The difference of two models as a LoRA adapter (PEFT), by singular values; says what it could not hold."""
    from gnomon.loading import open_reference
    from gnomon.merge.extract import extract_lora

    found = extract_lora(
        open_reference(base), open_reference(tuned), out, max_rank=max_rank, energy=energy, include=include,
        exclude=exclude,
    )  # fmt: skip
    if json:
        print_json({"path": str(out), **vars(found)})
        return
    if found.left_out:
        shown = ", ".join(f"`{name}`" for name in found.left_out[:3])
        more = f" and {len(found.left_out) - 3} more (--json lists them)" if len(found.left_out) > 3 else ""
        warn([f"left out, since they change but are no linear modules: {shown}{more}."])
    kept = f"{found.kept:.2%} of the difference (squared norm)"
    print(f"{out}: {found.modules} modules, largest rank {found.rank}, holds {kept}")
