"""`gnomon doctor`: what this machine and installation can do, and why not where it cannot."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

import typer

from gnomon.cli.common import human_bytes, print_json, print_table

app = typer.Typer(add_completion=False, rich_markup_mode=None)
EXTRAS = {"hub": "huggingface_hub", "transformers": "transformers"}


@app.command()
def doctor(
    determinism: bool = typer.Option(False, "--determinism", help="Test a model's exactness on this machine, now."),
    model: str = typer.Option("", "--model", "-m", metavar="REF", help="With --determinism: which model."),
    profile: str = typer.Option("", "--profile", help="With --determinism: fp32, bf16, int8 or gguf."),
    json: bool = typer.Option(False, "--json", help="As JSON."),
) -> None:
    """Check the machine, the kernels, the cache, the models and the extras.

    With --determinism: decode a request alone, in company, in chunks, from the cache, after preemption and with drafts,
    and compare every bit. Ends with code 1 when a bit differs.
    """
    if determinism:
        _determinism(model, profile, json)
        return
    facts = _facts()
    if json:
        print_json(facts)
        return
    print_table(("", ""), [(key, value) for key, value in facts.items() if not isinstance(value, dict)])
    for group in ("models", "extras"):
        print_table((group.upper(), ""), list(facts[group].items()))


def _determinism(reference: str, profile: str, json: bool) -> None:
    from gnomon.loading import load
    from gnomon.models.zoo import DEFAULT_MODEL

    with load(reference or DEFAULT_MODEL, profile=profile or None) as model:
        certificate = model.certificate(renew=True)
    if json:
        print_json(certificate.as_dict())
    else:
        words = {True: "passed", False: "FAILED"}
        rows = [(p.name, words[p.passed], f"{p.compared} comparisons", p.detail) for p in certificate.probes]
        print_table(("PROBE", "", "", ""), rows)
        facts = {
            "fingerprint": certificate.fingerprint,
            "digest": certificate.digest[:16],
            "operators": certificate.operator_digest[:16],
            **{key: str(value) for key, value in certificate.machine.items()},
            "seconds": certificate.seconds,
        }
        print_table(("", ""), list(facts.items()))
        if not certificate.covered:
            typer.echo("This network runs through transformers, not on canonical operators: its bits may vary.")
    if not certificate.passed:
        raise typer.Exit(1)


def _facts() -> dict[str, Any]:
    import torch

    from gnomon.kernels import native_reason
    from gnomon.kernels.threads import available_threads
    from gnomon.models.cache import cache_dir, models_dir, offline
    from gnomon.models.fetch import is_complete
    from gnomon.models.zoo import zoo
    from gnomon.version import __version__

    cache = cache_dir()
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    reason = native_reason()
    return {
        "gnomon": __version__,
        "python": f"{platform.python_version()} ({sys.executable})",
        "torch": torch.__version__,
        "cpu": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "threads": available_threads(),
        "memory": _memory(),
        "kernels": "native" if reason is None else f"torch: {reason}",
        "cache": str(cache),
        "cache writable": os.access(place, os.W_OK),
        "disk free": human_bytes(shutil.disk_usage(place).free),
        "offline": offline(),
        "models": {
            entry.name: "fetched" if is_complete(entry, models_dir() / entry.name) else f"gnomon pull {entry.name}"
            for entry in zoo().values()
        },
        "extras": {
            extra: "installed" if importlib.util.find_spec(module) else f"pip install 'gnomon[{extra}]'"
            for extra, module in EXTRAS.items()
        },
    }


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown"
    return human_bytes(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
