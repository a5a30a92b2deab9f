"""What the sampler's own arithmetic is worth, and what it costs.

gap: GRPO with the engine as sampler, and with transformers' generate and stock torch (bf16: autocast), the same rewards
and options; per step the estimated KL between sampler and trainer and the greatest gap of a log-probability. A series
is kept as soon as it is done, so an interrupted run goes on. Draws benchmarks/results/learn-gap.svg.
overhead: one training step (forward, log-probabilities, backward) on the canonical operators and on stock torch,
alternating in one process, medians. Usage: python benchmarks/learn.py gap|overhead [MODEL] [STEPS or TOKENS].
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import gnomon
from gnomon.arch.module import hf_module
from gnomon.engine.gradients import token_logprobs
from gnomon.kernels import available_threads, canonical
from gnomon.learn import GRPOConfig, GRPOTrainer, open_reward

RESULTS = Path(__file__).parent / "results"
FILE = RESULTS / "learn.json"
PROMPTS = ["Once upon a time", "The sea is", "My friend told me that", "In the morning we"]
ROUNDS = 5


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "threads": available_threads(),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "gnomon": gnomon.__version__,
    }


def kept() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text()) if FILE.exists() else {}
    return found


def keep(section: str, key: str, value: Any) -> None:
    everything = kept()
    everything.setdefault(section, {})[key] = value
    FILE.write_text(json.dumps(everything, indent=1) + "\n")


def gap(reference: str, steps: int) -> None:
    name = Path(reference).name
    for profile in ("bf16", "fp32"):
        for sampler in ("engine", "transformers"):
            key = f"{name} {profile} {sampler}"
            if key in kept().get("gap", {}):
                continue
            config = GRPOConfig(
                max_steps=steps,
                learning_rate=1e-5,
                lr_scheduler_type="constant",
                max_completion_length=24,
                sampler=sampler,
            )
            with gnomon.load(reference, profile=profile) as model:
                result = GRPOTrainer(model, open_reward("share:aeiou"), PROMPTS, config).train()
            series = [asdict(step) for step in result.steps]
            keep("gap", key, {"machine": machine(), "weights_digest": result.weights_digest, "steps": series})
            print(key, "greatest gap", max(step["max_abs_logprob_gap"] for step in series), flush=True)
    draw(name)


def draw(name: str) -> None:
    """Greatest gap by step, logarithmic; a zero stands on the floor of the picture, where it belongs."""
    width, height, left, floor, low, high = 720, 300, 70, 250, -7.0, 1.0
    colours = {"bf16 transformers": "#c0392b", "fp32 transformers": "#e08e0b", "bf16 engine": "#1f6f8b"}
    colours["fp32 engine"] = "#2e8b57"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}"',
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="18" font-size="13">{name}: greatest |log p(sampler) - log p(trainer)|</text>',
    ]

    def at(value: float) -> float:
        return floor if value == 0 else floor - 10 - (math.log10(value) - low) / (high - low) * (floor - 50)

    for power in range(int(low), int(high) + 1, 2):
        parts.append(f'<text x="10" y="{at(10.0**power) + 4:.0f}" fill="#555">1e{power}</text>')
        line = f'x1="{left}" x2="{width - 20}" y1="{at(10.0**power):.1f}" y2="{at(10.0**power):.1f}"'
        parts.append(f'<line {line} stroke="#ddd"/>')
    parts.append(f'<text x="10" y="{floor + 4}" fill="#555">exactly 0</text>')
    for place, (label, colour) in enumerate(colours.items()):
        series = kept().get("gap", {}).get(f"{name} {label}", {}).get("steps", [])
        if not series:
            continue
        across = (width - 20 - left) / max(1, len(series) - 1)
        points = " ".join(
            f"{left + i * across:.1f},{at(step['max_abs_logprob_gap']) + (2 if label == 'fp32 engine' else 0):.1f}"
            for i, step in enumerate(series)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(f'<text x="{left + place * 160}" y="{height - 12}" fill="{colour}">{label}</text>')
    (RESULTS / "learn-gap.svg").write_text("\n".join([*parts, "</svg>"]) + "\n")


def overhead(reference: str, tokens: int) -> None:
    threads = available_threads()
    torch.set_num_threads(threads)
    for profile in ("fp32", "bf16"):
        model = gnomon.load(reference, profile=profile, threads=threads)
        assert model.network is not None
        module = hf_module(model.network, model.checkpoint).float()
        ids = torch.tensor([[(7 + 31 * place) % (module.config.vocab_size - 1) for place in range(tokens)]])

        def step(ours: bool, module: Any = module, ids: Any = ids, profile: str = profile) -> tuple[float, float]:
            stock = torch.autocast("cpu", torch.bfloat16) if profile == "bf16" else nullcontext()
            module.zero_grad()
            started = time.perf_counter()
            with canonical(profile) if ours else stock:
                logits = module(input_ids=ids, use_cache=False).logits[0, :-1]
            if ours:
                chosen = token_logprobs(logits, ids[0, 1:])
            else:
                chosen = torch.log_softmax(logits.float(), -1).gather(1, ids[0, 1:, None])[:, 0]
            forward = time.perf_counter() - started
            (-chosen.mean()).backward()
            return forward, time.perf_counter() - started

        step(True), step(False)
        rounds = [(step(True), step(False)) for _ in range(ROUNDS)]
        ratios = sorted(ours[1] / stock[1] for ours, stock in rounds)
        found = {
            "machine": machine(),
            "tokens": tokens,
            "canonical_seconds": statistics.median(ours[1] for ours, _ in rounds),
            "stock_seconds": statistics.median(stock[1] for _, stock in rounds),
            "forward_ratio": statistics.median(ours[0] / stock[0] for ours, stock in rounds),
            "ratio": statistics.median(ratios),
            "ratio_spread": [ratios[0], ratios[-1]],
        }
        keep("overhead", f"{Path(reference).name} {profile}", found)
        print(profile, json.dumps({k: v for k, v in found.items() if k != "machine"}), flush=True)
        model.close()


def main() -> None:
    what, reference, count = [*sys.argv[1:], *["gap", "smollm2-135m-instruct", "0"][len(sys.argv) - 1 :]][:3]
    if what == "overhead":
        overhead(reference, int(count) or 256)
    elif what == "draw":
        draw(Path(reference).name)
    else:
        gap(reference, int(count) or 20)


if __name__ == "__main__":
    main()
