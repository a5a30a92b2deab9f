"""What a patch beside the weights costs per token, against none; the same for the `peft` library.

Random low-rank deltas of every projection of the model (the numbers cost the same whatever they are), decoded greedily
on one thread, all alternating in one process. Processor time is measured, which other work on the machine disturbs less
than the clock. The peer, where `peft` is installed: transformers `generate` over the same float32 weights with the same
patch exported, and with that adapter switched off. Usage: python benchmarks/patch.py. Writes results/patch.json.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gnomon
from gnomon.arch.module import hf_module
from gnomon.model import Model
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import LowRank, Patch
from gnomon.models.patch.peft import to_peft

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "benchmarks" / "results" / "patch.json"
MODEL, TOKENS, ROUNDS, BATCH = "smollm2-135m-instruct", 24, 5, 4
RANKS = {"fp32": (16, 64), "bf16": (16, 64), "int8": (16, 64)}
PROMPT = list(range(100, 108))
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}
Work = Callable[[], Any]


def random_patch(checkpoint: Checkpoint, rank: int) -> Patch:
    g = torch.Generator().manual_seed(rank)
    deltas = {}
    for name in checkpoint:
        if name.endswith("_proj.weight"):
            rows, columns = checkpoint.info(name).shape
            up = torch.randn(rows, rank, generator=g) * 0.01
            deltas[name] = LowRank(up, torch.randn(rank, columns, generator=g) * 0.1)
    return Patch(deltas, checkpoint.identity, {"method": "random", "rank": rank})


def timed(work: Work) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def at_once(model: Model, patches: list[list[str]]) -> Work:
    """Several requests in one batch, each with its patches."""

    def work() -> None:
        chosen = [{"patches": names} if names else {} for names in patches]
        for handle in [model.submit(PROMPT, {**OPTIONS, **more}) for more in chosen]:
            handle.collect()

    return work


def ours(profile: str) -> dict[str, tuple[Work, int]]:
    """Name -> (work, tokens it makes). The first one is the yardstick."""
    model = gnomon.load(MODEL, profile=profile, threads=1, speculation="off", ledger=False)
    runs: dict[str, tuple[Work, int]] = {"unpatched": (lambda: model.generate(PROMPT, **OPTIONS), TOKENS)}
    for rank in RANKS[profile]:
        model.patches.add(f"r{rank}", random_patch(model.checkpoint, rank))
        view = model.with_patches([f"r{rank}"])
        runs[f"beside, rank {rank}"] = (lambda v=view: v.generate(PROMPT, **OPTIONS)), TOKENS
    mixes: dict[str, list[list[str]]] = {
        "none patched": [[]] * BATCH,
        "one patched, rank 16": [["r16"], *[[]] * (BATCH - 1)],
        "all patched, rank 16": [["r16"]] * BATCH,
        "two patches by turns": [["r16"], ["r64"]] * (BATCH // 2),
    }
    for name, patches in mixes.items():
        runs[f"batch of {BATCH}, {name}"] = at_once(model, patches), BATCH * TOKENS
    return runs


def peers(folder: Path) -> dict[str, tuple[Work, int]]:
    """transformers over our float32 weights, with the adapter and with it switched off."""
    try:
        import peft
    except ImportError:
        return {}
    base = gnomon.load(MODEL, kernel="torch", threads=1, ledger=False)
    assert base.network is not None
    adapter = to_peft(random_patch(base.checkpoint, 16), folder / "adapter")
    wearing = peft.PeftModel.from_pretrained(hf_module(base.network, base.checkpoint), adapter)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def generate() -> None:
        with torch.inference_mode():
            wearing.generate(input_ids=torch.tensor([PROMPT]), **options)

    def without() -> None:
        with wearing.disable_adapter():
            generate()

    return {"unpatched": (without, TOKENS), "beside, rank 16": (generate, TOKENS)}


def measured(runs: dict[str, tuple[Work, int]]) -> dict[str, Any]:
    """Milliseconds of processor time per token, and the extra over the yardstick in percent, paired by round."""
    costs: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, (work, tokens) in runs.items():
            seconds = timed(work)
            if round_:  # the first round warms up
                costs[name].append(1000 * seconds / tokens)
    found: dict[str, Any] = {}
    for name, values in costs.items():
        yardstick = costs[f"batch of {BATCH}, none patched" if name.startswith("batch") else "unpatched"]
        extra = sorted(100 * (own / plain - 1) for own, plain in zip(values, yardstick, strict=True))
        found[name] = {
            "ms_per_token": round(statistics.median(values), 2),
            "extra_percent": {
                "median": round(statistics.median(extra), 1),
                "min": round(extra[0], 1),
                "max": round(extra[-1], 1),
            },
        }
    return found


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, one thread",
        "versions": f"torch {torch.__version__}",
        "commit": commit.stdout.strip(),
        "work": f"{MODEL}, {TOKENS} greedy tokens after {len(PROMPT)}, no speculation, {ROUNDS} rounds by turns; "
        "milliseconds of processor time per token, prompt included",
    }
    with tempfile.TemporaryDirectory() as folder:
        steps: dict[str, Callable[[], dict[str, tuple[Work, int]]]]
        steps = {f"gnomon {profile}": (lambda p=profile: ours(p)) for profile in RANKS}
        steps["peft fp32"] = lambda: peers(Path(folder))
        for name, make in steps.items():
            if runs := make():
                result[name] = measured(runs)
                result["load"] = [round(value, 1) for value in os.getloadavg()]
                TARGET.write_text(json.dumps(result, indent=2) + "\n")
                print(name, json.dumps(result[name]), flush=True)


if __name__ == "__main__":
    main()
