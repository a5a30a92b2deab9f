"""What happens without batch invariance: one prompt at temperature 0, in company and alone, in transformers and here.

transformers decodes "Tell me about Richard Feynman." (bf16) in batches of several sizes, with and without neighbours of
other lengths (left padding, as its batching does). Ours
decodes it among strangers that come and go. Shown: the share of completions that still equal the solo one, token by
token. Usage: python benchmarks/determinism.py; writes benchmarks/results/determinism.json and determinism.svg.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

import gnomon
from gnomon.arch.module import hf_module

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path.insert(0, str(ROOT / "tests"))
from helpers.feynman import PROMPT, STRANGERS, count_answers  # noqa: E402

MODEL, TOKENS = "smollm2-135m-instruct", 64
SIZES = (2, 3, 5, 8, 12)
Answer = tuple[int, ...]


def module_of(dtype: torch.dtype) -> tuple[Any, gnomon.Model]:
    base = gnomon.load(MODEL, kernel="torch", ledger=False, kv_memory=64 << 20)
    assert base.network is not None
    fp32 = hf_module(base.network, base.checkpoint)
    module = transformers.AutoModelForCausalLM.from_config(fp32.config, dtype=dtype)
    module.load_state_dict(fp32.state_dict())
    return module.eval(), base


def generated(module: Any, prompts: list[list[int]]) -> list[Answer]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        out = module.generate(ids, attention_mask=mask, **options)
    return [tuple(row[longest:].tolist()) for row in out]


def transformers_answers(module: Any, model: gnomon.Model) -> tuple[Answer, list[Answer]]:
    prompt = model.render(PROMPT)
    alone = generated(module, [prompt])[0]
    answers: list[Answer] = []
    for size in SIZES:
        answers += generated(module, [prompt] * size)
        others = [model.encode(STRANGERS[n % len(STRANGERS)] * (1 + n % 5 * 4)) for n in range(size - 1)]
        answers.append(generated(module, [prompt, *others])[0])
    return alone, answers


def kept(alone: Answer, answers: list[Answer]) -> list[float]:
    """Share of the answers that equal the solo one up to each token."""
    return [sum(a[:n] == alone[:n] for a in answers) / len(answers) for n in range(1, len(alone) + 1)]


def described(alone: Answer, answers: list[Answer]) -> dict[str, Any]:
    shares = kept(alone, answers)
    first = next((n for n, share in enumerate(shares) if share < 1), None)
    return {
        "completions": len(answers),
        "different_answers": len(set(answers)),
        "equal_to_the_solo_one": sum(a == alone for a in answers),
        "first_difference_at_token": first,
        "share_still_equal": [round(share, 3) for share in shares],
    }


def plot(curves: dict[str, list[float]]) -> str:
    """A small chart, written by hand: no plotting library is needed to see one line fall and another not."""
    left, top, width, height = 60, 30, 560, 240
    colours = ["#c0392b", "#e67e22", "#1f6feb"]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 30} {top + height + 100}" '
        'font-family="sans-serif" font-size="13">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="{left}" y="18">Share of completions equal to the solo one, token by token (temperature 0)</text>',
    ]
    for share in (0, 0.25, 0.5, 0.75, 1):
        y = top + height * (1 - share)
        parts.append(f'<line x1="{left}" x2="{left + width}" y1="{y}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4}" text-anchor="end">{share:.0%}</text>')
    for number, (name, curve) in enumerate(curves.items()):
        step = width / max(1, len(curve) - 1)
        points = " ".join(f"{left + n * step:.1f},{top + height * (1 - share):.1f}" for n, share in enumerate(curve))
        colour = colours[number % len(colours)]
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2.5"/>')
        y = top + height + 40 + 20 * number
        parts.append(
            f'<line x1="{left}" x2="{left + 24}" y1="{y - 4}" y2="{y - 4}" stroke="{colour}" stroke-width="3"/>'
        )
        parts.append(f'<text x="{left + 32}" y="{y}">{name}</text>')
    parts.append(f'<text x="{left + width}" y="{top + height + 18}" text-anchor="end">generated token</text></svg>')
    return "\n".join(parts) + "\n"


def main() -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result: dict[str, Any] = {
        "work": f"{MODEL}, {PROMPT!r} through its chat template, {TOKENS} tokens, temperature 0",
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": commit.stdout.strip(),
    }
    curves: dict[str, list[float]] = {}
    for name, dtype in (("bf16", torch.bfloat16),):
        module, base = module_of(dtype)
        alone, answers = transformers_answers(module, base)
        result[f"transformers {name}"] = described(alone, answers)
        label = f"transformers {name}, its own batching: {len(set(answers))} different answers of {len(answers)}"
        curves[label] = kept(alone, answers)
        base.close()
    with gnomon.load(MODEL, profile="bf16", ledger=False) as model:
        solo = model.generate(model.render(PROMPT), max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
        found = list(count_answers(model, completions=64, tokens=TOKENS).elements())
    result["gnomon bf16"] = described(tuple(solo.token_ids), found)
    curves[f"gnomon bf16, among strangers: {len(set(found))} answer of {len(found)}"] = kept(
        tuple(solo.token_ids), found
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "determinism.json").write_text(json.dumps(result, indent=2) + "\n")
    (RESULTS / "determinism.svg").write_text(plot(curves))
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
