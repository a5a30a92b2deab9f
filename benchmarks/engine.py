"""Decoding and prefill against transformers `generate` on the same weights, alternating in one process.

Ours: native kernels in fp32 and bf16, and the torch kernels. Theirs: transformers in fp32 and bf16, batch 1, greedy.
Usage: python benchmarks/engine.py. Writes benchmarks/results/engine.json.
"""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import gnomon
import gnomon.models.reference
from gnomon.arch.module import hf_module
from gnomon.kernels import available_threads

ROOT = Path(__file__).parents[1]
MODEL, TOKENS, PROMPT_TOKENS, ROUNDS = "smollm2-135m-instruct", 48, 512, 5


def timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def llama_cpp(prompt: list[int], long_prompt: list[int]) -> tuple[Callable[[], Any], Callable[[], Any]] | None:
    """The peer on the same GGUF file, where llama-cpp-python is installed."""
    try:
        from llama_cpp import Llama
    except ImportError:
        return None
    path = str(gnomon.models.reference.open_checkpoint(MODEL).file_path)
    # logits_all: prefill gives the logits of every token, as the others do here
    slow = Llama(path, n_ctx=1024, n_threads=2, n_threads_batch=2, logits_all=True, verbose=False)
    model = Llama(path, n_ctx=1024, n_threads=2, n_threads_batch=2, verbose=False)

    def decode() -> None:
        model.reset()
        for count, _ in enumerate(model.generate(prompt, temp=0.0)):
            if count + 1 == TOKENS:
                return

    def prefill() -> None:
        slow.reset()
        slow.eval(long_prompt)

    return decode, prefill


def main() -> None:
    prompt, long_prompt = list(range(100, 116)), list(range(100, 100 + PROMPT_TOKENS))
    runs: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {}
    for name, options in {
        "gnomon fp32": {"profile": "fp32"},
        "gnomon bf16": {"profile": "bf16"},
        "gnomon int8": {"profile": "int8"},
        "gnomon gguf": {"profile": "gguf"},
        "gnomon fp32, torch kernels": {"profile": "fp32", "kernel": "torch"},
    }.items():
        model = gnomon.load(MODEL, speculation="off", ledger=False, **options)
        runs[name] = (
            lambda m=model: m.generate(prompt, max_tokens=TOKENS, ignore_eos=True),
            lambda m=model: m.logits(long_prompt[:PROMPT_TOKENS]),
        )
    base = gnomon.load(MODEL, kernel="torch")
    assert base.network is not None
    fp32 = hf_module(base.network, base.checkpoint)
    bf16 = transformers.AutoModelForCausalLM.from_config(fp32.config, dtype=torch.bfloat16)
    bf16.load_state_dict(fp32.state_dict())
    for name, module in {"transformers fp32": fp32, "transformers bf16": bf16.eval()}.items():
        options = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, "pad_token_id": 0}

        def decode(m: Any = module, o: dict[str, Any] = options) -> None:
            with torch.inference_mode():
                m.generate(torch.tensor([prompt]), **o)

        def prefill(m: Any = module) -> None:
            with torch.inference_mode():
                m(torch.tensor([long_prompt]))

        runs[name] = (decode, prefill)
    if (peer := llama_cpp(prompt, long_prompt)) is not None:
        runs["llama.cpp Q4_1"] = peer
    rates: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in runs}
    for round_ in range(ROUNDS + 1):
        for name, (decode_, prefill_) in runs.items():
            seconds, prefill_seconds = timed(decode_), timed(prefill_)
            if round_:  # the first round warms up
                rates[name]["decode"].append(TOKENS / seconds)
                rates[name]["prefill"].append(PROMPT_TOKENS / prefill_seconds)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {available_threads()} threads",
        "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
        "commit": commit.stdout.strip(),
        "work": f"{MODEL}, batch 1, {TOKENS} tokens decoded; prefill with logits of {PROMPT_TOKENS} tokens; tokens/s",
        "rates": {
            name: {
                kind: {"median": round(statistics.median(v), 1), "min": round(min(v), 1), "max": round(max(v), 1)}
                for kind, v in kinds.items()
            }
            for name, kinds in rates.items()
        },
    }

    def ratio(ours: str, theirs: str, kind: str) -> float:
        return round(statistics.median(rates[ours][kind]) / statistics.median(rates[theirs][kind]), 2)

    result["ratios"] = {
        f"{kind} {dtype}: gnomon / transformers": ratio(f"gnomon {dtype}", f"transformers {dtype}", kind)
        for dtype in ("fp32", "bf16")
        for kind in ("decode", "prefill")
    }
    if "llama.cpp Q4_1" in rates:
        for kind in ("decode", "prefill"):
            result["ratios"][f"{kind}: gnomon gguf / llama.cpp"] = ratio("gnomon gguf", "llama.cpp Q4_1", kind)
    result["ratios"]["prefill: gnomon int8 / transformers bf16"] = ratio("gnomon int8", "transformers bf16", "prefill")
    target = ROOT / "benchmarks" / "results" / "engine.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
