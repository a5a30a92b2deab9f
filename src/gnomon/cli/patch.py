"""`gnomon patch`: make, look at, combine and apply patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from gnomon.cli.common import human_bytes, print_json, print_table
from gnomon.errors import UsageError

if TYPE_CHECKING:
    from gnomon.models.patch import Patch

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="""Patches: changes of a model's weights as files of their own.

\b
gnomon patch create BASE TUNED -o tuned.patch.safetensors --rank 16
gnomon chat BASE --patches tuned.patch.safetensors
gnomon serve BASE --patch tuned=tuned.patch.safetensors
gnomon patch apply MODEL_DIR tuned.patch.safetensors
gnomon patch revert MODEL_DIR
""",
)
OUT = typer.Option(..., "--output", "-o", metavar="FILE", help="The patch file to write (*.patch.safetensors).")
JSON = typer.Option(False, "--json", help="As JSON.")
FILE = typer.Argument(..., metavar="PATCH", help="A patch file.")


@app.command()
def create(
    base: str = typer.Argument(..., help="The model that the patch is for: any model reference."),
    tuned: str = typer.Argument(..., help="What it became: a model reference, or a PEFT LoRA directory."),
    output: Path = OUT,
    rank: int | None = typer.Option(None, "--rank", min=1, help="Low-rank deltas of at most this rank."),
    energy: float | None = typer.Option(None, "--energy", help="As few ranks as keep this share (0..1) of each delta."),
    only: list[str] = typer.Option([], "--only", metavar="PART", help="Only tensors whose name contains PART."),
    json: bool = JSON,
) -> None:
    """The change from BASE to TUNED as a patch. Low-rank ones can run beside the weights, per request."""
    from gnomon.loading import open_reference
    from gnomon.models.patch.difference import difference
    from gnomon.models.patch.peft import from_peft

    if rank is not None and energy is not None:
        raise UsageError("Give either --rank or --energy.")
    checkpoint = open_reference(base)
    if (Path(tuned) / "adapter_config.json").exists():
        patch = from_peft(Path(tuned), checkpoint)
        patch = patch.only(*only) if only else patch
        if rank is not None or energy is not None:
            patch = patch.to_low_rank(rank, energy=energy)
    else:
        patch = difference(checkpoint, open_reference(tuned), rank=rank, energy=energy, only=only)
    if patch.report.get("left_out"):
        typer.echo(f"left out, since vectors have no rank: {len(patch.report['left_out'])} tensors", err=True)
    _save(patch, output, json)


@app.command()
def show(
    patch: Path = FILE,
    tensors: bool = typer.Option(False, "--tensors", help="List every delta."),
    json: bool = JSON,
) -> None:
    """What a patch changes, for which model, and where it came from."""
    from gnomon.models.patch import Patch

    loaded = Patch.load(patch)
    rows = _rows(loaded) if tensors or json else []
    if json:
        more = {"metadata": dict(loaded.metadata), "report": dict(loaded.report)}
        print_json({**_facts(loaded), **more, "deltas": rows})
        return
    print_table(("", ""), [(key, value) for key, value in _facts(loaded).items() if value is not None])
    for key, value in loaded.metadata.items():
        print(f"{key}: {value}")
    if tensors:
        print_table(("TENSOR", "SHAPE", "KIND", "RANK", "NORM"), [tuple(row.values()) for row in rows])


@app.command()
def diff(first: Path = FILE, second: Path = FILE, json: bool = JSON) -> None:
    """Compare two patches tensor by tensor: norms, and the cosine between the deltas."""
    from gnomon.models.patch import Patch

    a, b = Patch.load(first), Patch.load(second)
    rows = [_compared(name, a, b) for name in sorted({*a.deltas, *b.deltas})]
    if json:
        print_json({"identical": a == b, "same_base": a.base == b.base, "tensors": rows})
        return
    if a.base != b.base:
        print(f"different bases: {a.base[:16]} and {b.base[:16]}")
    print_table(("TENSOR", "NORM 1", "NORM 2", "COSINE"), [tuple(row.values()) for row in rows])
    print("identical" if a == b else "different")


@app.command()
def merge(
    patches: list[Path] = typer.Argument(..., metavar="PATCH...", help="Two or more patches of one model."),
    output: Path = OUT,
    method: str = typer.Option("sum", "--method", help="sum, mean or ties."),
    weight: list[float] = typer.Option([], "--weight", help="One per patch, in order; default 1 each."),
    density: float = typer.Option(0.2, "--density", help="ties: the share of entries each patch keeps per tensor."),
    json: bool = JSON,
) -> None:
    """Several patches as one."""
    from gnomon.models.patch import Patch
    from gnomon.models.patch.merging import merge_patches

    loaded = [Patch.load(path) for path in patches]
    _save(merge_patches(loaded, method=method, weights=weight or None, density=density), output, json)


@app.command()
def negate(
    patch: Path = FILE,
    output: Path = OUT,
    factor: float = typer.Option(-1.0, "--factor", help="Multiply by this instead."),
    json: bool = JSON,
) -> None:
    """The opposite change (unlearning by task arithmetic), or the change times FACTOR."""
    from gnomon.models.patch import Patch

    _save(Patch.load(patch) * factor, output, json)


@app.command()
def compress(
    patch: Path = FILE,
    output: Path = OUT,
    rank: int | None = typer.Option(None, "--rank", min=1, help="At most this rank."),
    energy: float | None = typer.Option(None, "--energy", help="As few ranks as keep this share (0..1)."),
    only: list[str] = typer.Option([], "--only", metavar="PART", help="Only tensors whose name contains PART."),
    json: bool = JSON,
) -> None:
    """The best low-rank approximation of every delta, fit to run beside the weights."""
    from gnomon.models.patch import Patch

    loaded = Patch.load(patch)
    loaded = loaded.only(*only) if only else loaded
    _save(loaded.to_low_rank(rank, energy=energy), output, json)


@app.command()
def apply(
    model: Path = typer.Argument(..., help="A model directory with safetensors weights."),
    patch: str = typer.Argument(..., metavar="PATCH", help="A patch file, or a PEFT LoRA directory."),
    output: Path | None = typer.Option(None, "--output", "-o", metavar="DIR", help="A new directory; default: MODEL."),
    any_base: bool = typer.Option(False, "--any-base", help="Apply a patch made for another model all the same."),
    json: bool = JSON,
) -> None:
    """Write a patch into a model directory. `gnomon patch revert` takes it out again bit for bit."""
    from gnomon.models.patch.open import open_patch
    from gnomon.models.patch.written import apply_to_directory
    from gnomon.models.safetensors_checkpoint import DirectoryCheckpoint

    if not model.is_dir():
        raise UsageError(
            f"`{model}` is no model directory: only safetensors weights can be rewritten.",
            hint=f"Any model takes a patch as it is loaded: `{model}+{patch}`.",
        )
    checkpoint = DirectoryCheckpoint(model)
    undo = apply_to_directory(open_patch(Path(patch), checkpoint), model, output, any_base=any_base)
    result = DirectoryCheckpoint(output or model).identity
    if json:
        print_json({"model": str(output or model), "identity": result, "undo": str(undo)})
    else:
        print(f"{output or model} is {result[:16]} now; undo: gnomon patch revert {output or model}")


@app.command()
def revert(
    model: Path = typer.Argument(..., help="A model directory that a patch was applied to."),
    json: bool = JSON,
) -> None:
    """Take the last applied patch or edit out of a model directory: every bit as before."""
    from gnomon.models.patch.written import revert_directory

    restored = revert_directory(model)
    if json:
        print_json({"model": str(model), "identity": restored})
    else:
        print(f"{model} is {restored[:16]} again")


@app.command()
def export(
    patch: Path = FILE,
    folder: Path = typer.Argument(..., metavar="DIR", help="A new directory."),
    base: str | None = typer.Option(None, "--base", help="The base model's name, for adapter_config.json."),
) -> None:
    """Write a low-rank patch as a PEFT LoRA directory."""
    from gnomon.models.patch import Patch
    from gnomon.models.patch.peft import to_peft

    print(to_peft(Patch.load(patch), folder, base_name=base))


def _save(patch: Patch, output: Path, json: bool) -> None:
    patch.save(output)
    if json:
        print_json({"file": str(output), **_facts(patch)})
        return
    rank = f", rank {patch.rank}" if patch.rank else ""
    size = human_bytes(output.stat().st_size)
    print(f"{output}: {len(patch.touches)} tensors{rank}, {size}, {patch.identity[:16]}")


def _facts(patch: Patch) -> dict[str, Any]:
    return {
        "identity": patch.identity,
        "base": patch.base,
        "tensors": len(patch.touches),
        "kinds": ", ".join(sorted({one.kind for one in (*patch.deltas.values(), *patch.wrappers.values())})),
        "rank": patch.rank,
        "bytes": patch.bytes,
        "norm": patch.norm(),
        "runs_beside": patch.is_low_rank,
    }


def _rows(patch: Patch) -> list[dict[str, Any]]:
    return [
        {
            "tensor": name,
            "shape": "x".join(map(str, delta.shape)),
            "kind": delta.kind,
            "rank": getattr(delta, "rank", None),
            "norm": delta.norm(),
        }
        for name, delta in patch.deltas.items()
    ] + [
        {
            "tensor": name,
            "shape": ", ".join(f"{part} {'x'.join(map(str, tensor.shape))}" for part, tensor in one.tensors.items()),
            "kind": one.kind,
            "rank": None,
            "norm": None,
        }
        for name, one in patch.wrappers.items()
    ]


def _compared(name: str, a: Patch, b: Patch) -> dict[str, Any]:
    norms = [p.deltas[name].norm() if name in p.deltas else None for p in (a, b)]
    cosine = None
    if norms[0] and norms[1] and a.deltas[name].shape == b.deltas[name].shape:
        product = (a.dense(name).double() * b.dense(name).double()).sum()
        cosine = float(product) / (norms[0] * norms[1])
    return {"tensor": name, "norm_1": norms[0], "norm_2": norms[1], "cosine": cosine}
