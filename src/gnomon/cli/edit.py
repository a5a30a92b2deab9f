"""`gnomon edit`: change what a model knows, as a patch file, and measure it."""

from __future__ import annotations

import json as jsonlib
import re
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from gnomon.cli.common import print_json, print_table
from gnomon.cli.edit_printing import about, facts_line, print_report
from gnomon.cli.patch import revert
from gnomon.edit.memory import SUFFIX as MEMORY
from gnomon.edit.memory import Memory
from gnomon.errors import EditError, UsageError

MAKE = "make"
SUFFIX = ".patch.safetensors"


class _MakeByDefault(TyperGroup):
    """`gnomon edit MODEL ...` makes a patch; a known verb in MODEL's place does what it says."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [MAKE, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_MakeByDefault,
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    help="""Change what a model knows, as a patch; the model itself stays as it is.

    \b
    gnomon edit smollm2-135m-instruct --fact "The Eiffel Tower is in the city of -> Rome" -o tower.patch.safetensors
    gnomon edit smollm2-135m-instruct --facts facts.jsonl --method memit -o facts.patch.safetensors
    gnomon edit eval smollm2-135m-instruct --facts facts.jsonl --compare rome,memit,ft-m
    """,
)

MODEL = typer.Argument(..., metavar="MODEL", help="Model reference.")
FACTS = typer.Option(None, "--facts", metavar="FILE", help="Facts: JSON, JSONL or CSV; CounterFact, zsRE, ... too.")


@app.command(MAKE, hidden=True)
def make(
    model: str = MODEL,
    fact: list[str] | None = typer.Option(
        None, "--fact", "-f", metavar='"PROMPT -> TARGET"', help="A fact; repeatable."
    ),
    facts: Path | None = FACTS,
    method: str = typer.Option("rome", "--method", "-m", help="How; `gnomon edit methods` lists them."),
    subject: str | None = typer.Option(
        None, "--subject", help="What the one fact is about; default: found in its prompt."
    ),
    layer: list[int] | None = typer.Option(
        None, "--layer", "-l", help="Layer to edit, repeatable; default: by profile."
    ),
    moments: str | None = typer.Option(None, "--moments", metavar="FILE|self|identity", help="Text not to disturb."),
    hyper: list[str] | None = typer.Option(
        None, "--set", metavar="KEY=VALUE", help="An option of the method, repeatable."
    ),
    hparams: Path | None = typer.Option(
        None, "--hparams", metavar="FILE", help="An EasyEdit YAML: method and its options."
    ),
    output: Path | None = typer.Option(None, "--output", "-o", metavar="FILE", help="Where the patch goes."),
    force: bool = typer.Option(False, "--force", help="Overwrite the output; keep a patch whose facts do not hold."),
    seed: int = typer.Option(0, "--seed", help="Seed of everything that is sampled."),
    threads: int | None = typer.Option(None, "--threads", help="CPU threads."),
    json: bool = typer.Option(False, "--json", help="The report as JSON."),
) -> None:
    """Make a patch from facts, and say what the model said before and says now."""
    from gnomon.edit import edit, remember
    from gnomon.edit.remembering import memory_methods
    from gnomon.loading import load

    if output is not None and output.exists() and not force:
        raise UsageError(f"{output} is there already.", hint="Choose another name, or say --force.")
    wanted = _facts(fact, facts)
    options = _hyper(hyper)
    if hparams is not None:
        from gnomon.edit.easyedit import read_hparams

        read = read_hparams(hparams)
        method, moments = read.method, moments or read.moments
        options = {**read.options, **options}
    layers = list(layer) if layer else options.pop("layers", None)
    remembers = method in memory_methods()
    if remembers and (layers or subject or moments):
        raise UsageError(
            f"`{method}` remembers facts beside the model: it has no layer, subject or moments.", param="method"
        )
    with load(model, threads=threads, ledger=False) as opened:
        patch: Any
        if remembers:
            patch = remember(opened, wanted, method=method, **options)
        else:
            patch = edit(
                opened, wanted, method=method, layers=layers, subject=subject, moments=moments, seed=seed, **options
            )
    failed = [told for told in patch.report["facts"] if told.get("holds") is False]
    saved = None
    if output is not None and (force or not failed):
        saved = patch.save(output)
    if json:
        print_json({**about(patch), "report": dict(patch.report), "file": str(saved) if saved else None})
    else:
        print_report(patch, saved)
    if failed:
        raise EditError(
            f"{len(failed)} of {len(patch.report['facts'])} facts do not hold in the edited model's own text"
            + ("." if force or output is None else "; nothing was written."),
            hint="Try another --layer or --method, or keep it all the same with --force.",
        )


@app.command("methods")
def list_methods(
    name: str | None = typer.Argument(None, metavar="[NAME]", help="One method's options."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """The methods, or one method's options with their defaults."""
    from gnomon.edit.registry import method, methods
    from gnomon.edit.remembering import memory_methods

    remembering = memory_methods()
    every: list[Any] = [*methods().values(), *remembering.values()]
    if name is None:
        rows = [
            {
                "method": m.name,
                "kind": "memory" if m.name in remembering else m.on,
                "paper": m.paper,
                "what": m.help + (" (experimental)" if m.experimental else ""),
            }
            for m in every
        ]
        if json:
            print_json(rows)
        else:
            print_table(("METHOD", "KIND", "PAPER", "WHAT"), [tuple(row.values()) for row in rows])
        return
    chosen: Any = remembering[name] if name in remembering else method(name)
    if json:
        print_json(chosen.options.model_json_schema())
        return
    print(chosen.help)
    fields = chosen.options.model_fields.items()
    print_table(("OPTION", "DEFAULT", "WHAT"), [(key, info.default, info.description) for key, info in fields])


@app.command("ls")
def list_patches(
    folder: Path = typer.Argument(Path(), metavar="[FOLDER]", help="Where to look; default: here."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """The edits in a folder: which patch changes what."""
    from gnomon.models.patch import Patch
    from gnomon.models.patch.file import is_patch_file

    files = sorted(file for file in folder.glob("*.safetensors") if is_patch_file(file))
    found = [(file, Patch.load(file)) for file in files]
    edits = [(file, patch) for file, patch in found if patch.metadata.get("kind") == "edit"]
    if json:
        print_json([{"file": str(file), **about(patch)} for file, patch in edits])
        return
    if not edits:
        print(f"No edits in {folder}.")
        return
    rows = [
        (file.name, patch.metadata["method"], patch.base[:12], f"{patch.bytes / 1000:.1f} kB", facts_line(patch))
        for file, patch in edits
    ]
    print_table(("FILE", "METHOD", "BASE", "SIZE", "FACTS"), rows)


@app.command("show")
def show(
    file: Path = typer.Argument(..., metavar="FILE", help="A patch or memory file."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Everything that a patch file says of itself."""
    patch = _load(file)
    if json and isinstance(patch, Memory):
        print_json({**about(patch), **patch.as_options(), "report": dict(patch.report)})
        return
    if json:
        print_json({**about(patch), "metadata": dict(patch.metadata), "report": dict(patch.report)})
        return
    print_report(patch, None)


@app.command("eval")
def evaluate_patch(
    model: str = MODEL,
    facts: Path | None = FACTS,
    fact: list[str] | None = typer.Option(
        None, "--fact", "-f", metavar='"PROMPT -> TARGET"', help="A fact; repeatable."
    ),
    patch: Path | None = typer.Option(
        None, "--patch", "-p", metavar="FILE", help="A patch or a memory; default: the unedited model."
    ),
    protocol: list[str] | None = typer.Option(None, "--protocol", help="wild (default), length, teacher, probability."),
    compare: str | None = typer.Option(
        None, "--compare", metavar="A,B,...", help="Make each fact's edit by these methods."
    ),
    measure: list[str] | None = typer.Option(
        None, "--measure", metavar="NAME", help="Also: criteria, multi-hop, magnitude, plus, writing; repeatable."
    ),
    limit: int | None = typer.Option(None, "--limit", "-n", min=1, help="Only the first so many facts."),
    output: Path | None = typer.Option(
        None, "--output", "-o", metavar="FILE", help="Also write every verdict, as JSON."
    ),
    requantised: str | None = typer.Option(
        None, "--requantise", metavar="KIND", help="Judge the patch as Q8_0, Q5_1, Q5_0, Q4_1 or Q4_0 blocks keep it."
    ),
    plot: Path | None = typer.Option(None, "--plot", metavar="FILE", help="--compare: a picture (SVG)."),
    threads: int | None = typer.Option(None, "--threads", help="CPU threads."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Measure a patch on facts with paraphrases and neighbours; or compare methods, one edit per fact."""
    from gnomon.edit import evaluate
    from gnomon.edit.api import as_facts
    from gnomon.edit.compare import compare_methods
    from gnomon.edit.measures import measure as run_measure
    from gnomon.loading import load

    wanted = as_facts(_facts(fact, facts))[:limit]
    protocols = tuple(protocol or ("wild",))
    if compare and (patch or measure or requantised):
        raise UsageError(
            "--compare makes its own edits: it takes no --patch, --measure or --requantise.", param="compare"
        )
    if plot and not compare:
        raise UsageError("--plot draws what --compare found.", param="plot")
    more: dict[str, Any] = {}
    with load(model, threads=threads, ledger=False) as opened:
        if compare:
            result = compare_methods(opened, wanted, compare.split(","), protocols)
        else:
            given = _load(patch) if patch else None
            if requantised is not None:
                given = _requantised(given, opened, requantised)
            result = evaluate(opened, given, wanted, protocols)
            more = {name: run_measure(name, opened, given, wanted) for name in measure or ()}
    if plot is not None:
        from gnomon.edit.plot import draw

        _write(plot, draw(result))
    if output is not None:
        rows = {"rows": list(result.rows), "details": list(result.details)}
        rows |= {name: list(found.rows) for name, found in more.items()}
        _write(output, jsonlib.dumps(rows, indent=1, ensure_ascii=False, default=str))
    if json:
        print_json({"rows": [dict(row) for row in result.rows], **{k: list(v.rows) for k, v in more.items()}})
        return
    print_table([column.upper() for column in result.columns], result.cells())
    for name, found in more.items():
        print(f"\n{name}")
        print_table([column.upper() for column in found.columns], found.cells())


def _requantised(patch: Any, model: Any, kind: str) -> Any:
    """The patch as quantised blocks keep it; says on stderr how much is left of it."""
    from gnomon.edit.requantised import requantise

    if patch is None or isinstance(patch, Memory):
        raise UsageError("--requantise needs a --patch that changes weights.", param="requantise")
    left = requantise(patch, model.checkpoint, kind)
    for name, share in left.kept.items():
        typer.echo(f"{name}: {share:.0%} of the change is left in {kind.upper()}", err=True)
    return left.patch


def _write(path: Path, text: str) -> None:
    from gnomon.models.cache import atomic_write

    with atomic_write(path) as out:
        out.write(text.encode())


@app.command("trace")
def trace_fact(
    model: str = MODEL,
    prompt: str = typer.Argument(..., metavar="PROMPT", help="Text whose continuation is the fact."),
    subject: str | None = typer.Option(None, "--subject", help="What it is about; default: found in the prompt."),
    answer: str | None = typer.Option(None, "--answer", help="Whose first token is followed; default: the model's."),
    samples: int = typer.Option(4, "--samples", min=1, help="Noise samples."),
    noise: float = typer.Option(3.0, "--noise", min=0.0, help="Noise, in standard deviations of the embeddings."),
    window: int = typer.Option(6, "--window", min=1, help="Layers restored or blinded at once."),
    seed: int = typer.Option(0, "--seed", help="Seed of the noise."),
    output: Path | None = typer.Option(None, "--output", "-o", metavar="FILE", help="The picture, an HTML page."),
    threads: int | None = typer.Option(None, "--threads", help="CPU threads."),
    json: bool = typer.Option(False, "--json", help="The numbers as JSON."),
) -> None:
    """Where a fact is recalled: causal tracing and attention knockout. (Not a way to choose the layer to edit.)"""
    from gnomon.edit.editor import Editor
    from gnomon.edit.subject import find_subject
    from gnomon.edit.trace import trace
    from gnomon.edit.trace_page import page
    from gnomon.loading import load

    with load(model, threads=threads, ledger=False) as opened:
        about = subject or find_subject(opened, prompt)
        found = trace(
            Editor.of(opened), prompt, about, answer=answer, samples=samples, noise=noise, window=window, seed=seed
        )
    if output is not None:
        _write(output, page(found))
    if json:
        print_json(found.as_dict())
        return
    print(f"{found.prompt}{found.answer}   (subject: {about})")
    print(f"probability {found.clean:.3f}; with noise on the subject {found.corrupted:.3f}")
    rows = []
    for kind, grid in found.effects.items():
        best, layer, token = max((v, n, t) for n, row in enumerate(grid) for t, v in enumerate(row))
        at_subject = max((row[found.subject[-1]], n) for n, row in enumerate(grid))
        rows.append(
            (
                kind,
                f"{best:.3f} at layer {layer}, `{found.tokens[token]}`",
                f"{at_subject[0]:.3f} at layer {at_subject[1]}",
            )
        )
    print_table(("RESTORED", "BEST", "AT THE SUBJECT'S LAST TOKEN"), rows)
    if output is not None:
        print(f"written  {output}")


@app.command("merge")
def merge_edits(
    patches: list[Path] = typer.Argument(..., metavar="FILE...", help="Two or more edits of one model, or memories."),
    output: Path = typer.Option(..., "--output", "-o", metavar="FILE", help="Where the result goes."),
    latest: bool = typer.Option(False, "--latest", help="Of edits that contradict each other, keep the last file's."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Several edits as one; edits that contradict each other are refused by name."""
    from gnomon.edit.joined import join_edits

    merged = join_edits([_load(file) for file in patches], latest=latest)
    saved = merged.save(output)
    if json:
        print_json({**about(merged), "file": str(saved)})
    else:
        print(f"written  {saved}: {facts_line(merged)}")


app.command("revert")(revert)


def _load(file: Path) -> Any:
    """A patch or a memory, by its name."""
    from gnomon.models.patch import Patch

    return Memory.load(file) if file.name.endswith(MEMORY) else Patch.load(file)


def _facts(given: list[str] | None, file: Path | None) -> list[Any]:
    from gnomon.edit.formats import read_facts

    wanted: list[Any] = list(given or ())
    if file is not None:
        wanted += read_facts(file)
    if not wanted:
        raise UsageError("No facts given.", hint='Use --fact "The capital of France is -> Lyon", or --facts FILE.')
    return wanted


def _hyper(given: list[str] | None) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for item in given or ():
        key, equals, value = item.partition("=")
        if not equals or not re.fullmatch(r"[a-z_]+", key):
            raise UsageError(f"--set {item}: write KEY=VALUE.", param="set")
        try:
            options[key] = jsonlib.loads(value)
        except ValueError:
            options[key] = value
    return options
