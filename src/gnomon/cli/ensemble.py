"""`gnomon ensemble`: several models as one: generate, serve, check whether they fit, sweep a weight or a threshold."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import typer

from gnomon.cli import common

app = typer.Typer(
    add_completion=False,
    rich_markup_mode=None,
    no_args_is_help=True,
    help="Several models, one distribution, whatever their vocabularies.\n\n"
    "gnomon ensemble generate -m smollm2-135m-instruct -m gemma-3-270m 'The capital of France is'\n\n"
    "gnomon ensemble check smollm2-135m-instruct gemma-3-270m --text notes.txt",
)
Refs = typer.Argument(None, help="Model references, or one recipe or GaC file.", show_default=False)
Core = typer.Option(None, "--core", help="union (default), topk or byte.")
Weights = typer.Option(None, "--weights", help="Votes, as 2,1: one per member, normalised.")
Fuse = typer.Option(None, "--fuse", help="arithmetic (default), geometric, contrastive or proxy.")
When = typer.Option(None, "--when", help="every (default), gate, entropy or safe.")
Threshold = typer.Option(None, "--threshold", help="Of the gate (a probability) or the entropy (nats).")
Primary = typer.Option(None, "--primary", help="The member that leads: its name.")
Profile = typer.Option(None, "--profile", help="Numeric profile of all members: fp32, bf16, int8 or gguf.")
Threads = typer.Option(None, "--threads", help="CPU threads; default: the CPUs really available.")
Json = typer.Option(False, "--json", help="As JSON.")
Text = typer.Option(None, "--text", help="A text file; without one, a built-in sample of several languages and code.")


@app.command()
def generate(
    prompt: str = typer.Argument(None, help="The prompt; - or nothing reads standard input.", show_default=False),
    member: list[str] = typer.Option([], "--member", "-m", help="A member; give several, or one recipe or GaC file."),
    core: str = Core,
    weights: str = Weights,
    fuse: str = Fuse,
    when: str = When,
    threshold: float = Threshold,
    primary: str = Primary,
    chat: bool = typer.Option(
        False, "--chat", "-c", help="PROMPT is one user message, through each member's template."
    ),
    trace: bool = typer.Option(False, "--trace", help="Show every token's votes."),
    max_tokens: int = typer.Option(None, "--max-tokens", help="Most symbols to generate (byte core: bytes)."),
    temperature: float = typer.Option(0.0, "--temperature", "-t", help="0 is greedy."),
    seed: int = typer.Option(None, "--seed", help="Makes sampling repeatable."),
    profile: str = Profile,
    threads: int = Threads,
    json: bool = Json,
) -> None:
    """Continue PROMPT with several models as one.

    \b
    gnomon ensemble generate -m smollm2-135m-instruct -m gemma-3-270m "The capital of France is"
    gnomon ensemble generate -m gac.yaml --chat "Name three colours" --trace
    """
    text = common.read_prompt(prompt)
    said = _said(core, weights, fuse, when, threshold, primary)
    options: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    options |= {"logprobs": 0, "ensemble": {"trace": True}} if trace else {}
    with _opened(member, said, profile, threads) as model:
        result = model.chat(text, **options) if chat else model.generate(text, **options)
    if json:
        from gnomon.cli.generate import _plain

        common.print_json(_plain(result))
        return
    print(result.text)
    if trace:
        _show_votes(result)


@app.command()
def serve(
    refs: list[str] = Refs,
    core: str = Core,
    weights: str = Weights,
    fuse: str = Fuse,
    when: str = When,
    threshold: float = Threshold,
    primary: str = Primary,
    host: str = typer.Option("127.0.0.1", "--host", help="Address to bind to."),
    port: int = typer.Option(8000, "--port", "-p", help="Port; 0 takes a free one."),
    api_key: str = typer.Option(None, "--api-key", help="Clients must send it as a bearer token."),
    profile: str = Profile,
    threads: int = Threads,
) -> None:
    """Serve members and their ensemble: `model: "a+b"` in a request, or each by its own name.

    \b
    gnomon ensemble serve smollm2-135m-instruct gemma-3-270m
    """
    from gnomon.recipe import ServeOptions
    from gnomon.serve.app import create_app
    from gnomon.serve.run import address, bind, run

    options = ServeOptions(host=host, port=port, api_key=api_key)
    listener = bind(options)
    model = _opened(refs, _said(core, weights, fuse, when, threshold, primary), profile, threads)
    models = {model.name: model, **dict(zip(model.member_names, model.models, strict=True))}
    if len(model.member_names) > 1:
        models["+".join(model.member_names)] = model
        models["+".join(reversed(model.member_names))] = model
    where = address(listener)

    def ready() -> None:
        for name in models:
            print(f"  {name}", file=sys.stderr)
        print(f"  studio  {where}/\n  API     {where}/v1", file=sys.stderr)

    run(create_app(models, options), listener, options, ready)


@app.command()
def check(
    refs: list[str] = Refs,
    text: Path = Text,
    profile: str = Profile,
    threads: int = Threads,
    json: bool = Json,
) -> None:
    """Do these models fit? Vocabulary overlap, tokenisation agreement, likelihood gap, expected cost.

    \b
    gnomon ensemble check smollm2-135m-instruct gemma-3-270m --text notes.txt
    """
    from gnomon.ensemble.check import check as run_check

    with _opened(refs, {"core": "byte"}, profile, threads) as model:
        report = run_check(model, _text(text))
    if json:
        common.print_json(report)
        return
    rows = [(m["name"], m["vocabulary"], m["bits_per_byte"], m["ms_per_token"]) for m in report["members"]]
    common.print_table(("MEMBER", "VOCABULARY", "BITS/BYTE", "MS/TOKEN"), rows)
    for line in report["findings"]:
        print(line)


@app.command()
def sweep(
    refs: list[str] = Refs,
    text: Path = Text,
    threshold: bool = typer.Option(False, "--threshold", help="Sweep the gate's threshold instead of the weight."),
    profile: str = Profile,
    threads: int = Threads,
    json: bool = Json,
) -> None:
    """Bits per byte for weights of the first of two members, or what a gate would save at each threshold.

    \b
    gnomon ensemble sweep smollm2-135m-instruct gemma-3-270m --text notes.txt
    """
    from gnomon.ensemble.check import sweep_gate, sweep_weight

    with _opened(refs, {"core": None if threshold else "byte"}, profile, threads) as model:
        rows = sweep_gate(model, _text(text)) if threshold else sweep_weight(model, _text(text))
    if json:
        common.print_json(rows)
        return
    common.print_table([key.upper().replace("_", " ") for key in rows[0]], [list(row.values()) for row in rows])


def _opened(refs: list[str] | None, said: dict[str, Any], profile: str | None, threads: int | None) -> Any:
    """The ensemble of some references, or of one file."""
    from gnomon.ensemble import Ensemble
    from gnomon.ensemble.resolving import opened_file

    if refs and len(refs) == 1 and refs[0].endswith((".yaml", ".yml")):
        return opened_file(refs[0], {k: v for k, v in said.items() if v is not None}, profile, threads)
    return Ensemble(refs or [], profile=profile, threads=threads, **said)


def _said(
    core: str | None,
    weights: str | None,
    fuse: str | None,
    when: str | None,
    threshold: float | None,
    primary: str | None,
) -> dict[str, Any]:
    from gnomon.errors import UsageError

    try:
        numbers = [float(part) for part in weights.split(",")] if weights else None
    except ValueError:
        raise UsageError(f"--weights {weights}: not numbers with commas.", param="weights") from None
    return {
        "core": core, "weights": numbers, "fuse": fuse, "when": when, "threshold": threshold, "primary": primary,
    }  # fmt: skip


def _text(path: Path | None) -> str:
    from gnomon.ensemble.check import SAMPLE
    from gnomon.errors import UsageError

    if path is None:
        return SAMPLE
    try:
        found = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--text {path}: {error}.", param="text") from None
    if not found.strip():
        raise UsageError(f"--text {path}: the file is empty.", param="text")
    return found


def _show_votes(result: Any) -> None:
    rows = []
    for token in result.logprobs or ():
        votes = (token.trace or {}).get("ensemble", {}).get("votes", {})
        shown = ", ".join(f"{name} {'-' if v is None else format(v, '.2f')}" for name, v in votes.items())
        rows.append((repr(token.text), f"{token.logprob:.2f}", shown))
    common.print_table(("TOKEN", "LOGPROB", "VOTES"), rows)
