"""What a patch beside the weights costs per token: against no patch, against patched weights, and against PEFT.

Random low-rank deltas of every projection of the model (the numbers cost the same whatever they are), decoded greedily,
alone and four at once, all alternating in one process on one thread. Processor time is measured, which other work on
the machine disturbs less than the clock. The peer: transformers `generate` with the same patch exported to PEFT (where
`peft` is installed), and without it. Usage: python benchmarks/patch.py. Writes results/patch.json.
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
MODEL, TOKENS, ROUNDS, BATCH = "smollm2-135m-instruct", 16, 4, 4
RANKS = {"fp32": (4, 16, 64), "bf16": (16,), "int8": (16,)}
PROMPT = list(range(100, 116))
OPTIONS: dict[str, Any] = {"max_tokens": TOKENS, "ignore_eos": True}


def random_patch(checkpoint: Checkpoint, rank: int) -> Patch:
    g = torch.Generator().manual_seed(rank)
    deltas = {}
    for name in checkpoint:
        if name.endswith("_proj.weight"):
            rows, columns = checkpoint.info(name).shape
            up = torch.randn(rows, rank, generator=g) * 0.01
            deltas[name] = LowRank(up, torch.randn(rank, columns, generator=g) * 0.1)
    return Patch(deltas, checkpoint.identity, {"method": "random", "rank": rank})


def timed(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def alone(model: Model) -> Callable[[], Any]:
    return lambda: model.generate(PROMPT, **OPTIONS)


def at_once(model: Model, patched: int) -> Callable[[], Any]:
    """Several requests in one batch, the first `patched` of them with the patch."""

    def work() -> None:
        chosen = [{"patches": ["r16"]} if place < patched else {} for place in range(BATCH)]
        for handle in [model.submit(PROMPT, {**OPTIONS, **more}) for more in chosen]:
            handle.collect()

    return work


def peers(patch: Patch, folder: Path) -> dict[str, Callable[[], Any]]:
    """transformers over the same float32 weights, without and with the adapter."""
    import transformers

    base = gnomon.load(MODEL, kernel="torch", threads=1, ledger=False)
    assert base.network is not None
    module = hf_module(base.network, base.checkpoint)
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

    def generate(model: Any) -> Callable[[], Any]:
        def work() -> None:
            with torch.inference_mode():
                model.generate(input_ids=torch.tensor([PROMPT]), **options)

        return work

    found = {f"transformers {transformers.__version__} fp32": generate(module)}
    try:
        import peft
    except ImportError:
        return found
    state = module.state_dict()
    twin = transformers.AutoModelForCausalLM.from_config(module.config, dtype=torch.float32)
    twin.load_state_dict(state)
    wearing = peft.PeftModel.from_pretrained(twin.eval(), to_peft(patch, folder / "adapter"))
    found[f"peft {peft.__version__} fp32, rank 16"] = generate(wearing)
    return found


def main() -> None:
    runs: dict[str, tuple[Callable[[], Any], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for profile, ranks in RANKS.items():
            model = gnomon.load(MODEL, profile=profile, threads=1, speculation="off", ledger=False)
            runs[f"{profile} unpatched"] = alone(model), TOKENS
            for rank in ranks:
                patch = random_patch(model.checkpoint, rank)
                model.patches.add(f"r{rank}", patch)
                runs[f"{profile} beside, rank {rank}"] = alone(model.with_patches([f"r{rank}"])), TOKENS
            if profile == "fp32":
                for patched in (0, BATCH // 2, BATCH):
                    runs[f"{profile} batch of {BATCH}, {patched} patched"] = at_once(model, patched), TOKENS * BATCH
                sixteen = random_patch(model.checkpoint, 16)
                inside = gnomon.load(sixteen.apply(model.checkpoint), threads=1, speculation="off", ledger=False)
                runs["fp32 inside the weights, rank 16"] = alone(inside), TOKENS
                for name, work in peers(sixteen, Path(folder)).items():
                    runs[name] = work, TOKENS
        rates: dict[str, list[float]] = {name: [] for name in runs}
        for round_ in range(ROUNDS + 1):
            for name, (work, tokens) in runs.items():
                seconds = timed(work)
                if round_:  # the first round warms up
                    rates[name].append(tokens / seconds)
    medians = {name: statistics.median(values) for name, values in rates.items()}

    def cost(name: str, against: str) -> dict[str, float]:
        """Extra time per token in percent: the median over rounds of the paired ratio, and its range."""
        extra = sorted(100 * (b / a - 1) for a, b in zip(rates[name], rates[against], strict=True))
        return {"median": round(statistics.median(extra), 1), "min": round(extra[0], 1), "max": round(extra[-1], 1)}

    extra = {
        f"{profile} beside, rank {rank}": cost(f"{profile} beside, rank {rank}", f"{profile} unpatched")
        for profile, ranks in RANKS.items()
        for rank in ranks
    }
    for patched in (BATCH // 2, BATCH):
        name = f"fp32 batch of {BATCH}, {patched} patched"
        extra[name] = cost(name, f"fp32 batch of {BATCH}, 0 patched")
    extra["fp32 beside, against inside the weights, rank 16"] = cost(
        "fp32 beside, rank 16", "fp32 inside the weights, rank 16"
    )
    theirs = [name for name in runs if name.startswith(("transformers", "peft"))]
    if len(theirs) == 2:
        extra[f"{theirs[1]}, against {theirs[0]}"] = cost(theirs[1], theirs[0])
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, one thread",
        "load": [round(value, 1) for value in os.getloadavg()],
        "commit": commit.stdout.strip(),
        "work": f"{MODEL}, {TOKENS} greedy tokens after {len(PROMPT)}, no speculation, {ROUNDS} rounds, by turns",
        "tokens_per_processor_second": {name: round(value, 1) for name, value in medians.items()},
        "extra_processor_time_per_token_percent": extra,
    }
    for name in theirs:
        ours = "fp32 beside, rank 16" if "rank" in name else "fp32 unpatched"
        result.setdefault("ratios", {})[f"{ours} / {name}"] = round(medians[ours] / medians[name], 2)
    target = ROOT / "benchmarks" / "results" / "patch.json"
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
