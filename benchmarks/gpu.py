"""Certify and time the GPU kernels on a real GPU; nothing here runs without one.

Certifies: products against float64, rows alone and in company, attention in pieces, and a model's own certificate.
Times: each kernel against torch (cuBLAS, SDPA) on the same shapes, a model's decoding, and vLLM, with and without
VLLM_BATCH_INVARIANT=1 where it is installed.
Usage: python benchmarks/gpu.py [MODEL]. Writes benchmarks/results/gpu-DEVICE.json.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import gnomon
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.probes import probe_operators
from gnomon.kernels.triton_operators import TritonOperators

RESULTS = Path(__file__).parent / "results"
SHAPES = [(576, 576), (1536, 576), (576, 1536), (4096, 4096), (49152, 576)]
ROWS = (1, 16, 256)
ROUNDS = 20
VLLM = """
import json, sys, time
from vllm import LLM, SamplingParams
model = LLM(sys.argv[1], dtype="bfloat16", enforce_eager=False)
params = SamplingParams(max_tokens=128, temperature=0.0, ignore_eos=True)
prompts = ["Tell me about the sea."] * int(sys.argv[2])
model.generate(prompts, params)
started = time.perf_counter()
model.generate(prompts, params)
print("SECONDS", time.perf_counter() - started)
"""


def timed(work: Callable[[], Any]) -> float:
    """Median milliseconds, by the device's own clock."""
    work()
    found = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def certify(dtype: str) -> dict[str, Any]:
    operators = TritonOperators(dtype)
    probes = [vars(probe) for probe in probe_operators(operators)]
    x, weight = torch.randn(70, 576), torch.randn(1536, 576) / 24
    held = [t.bfloat16() if dtype == "bf16" else t for t in (x, weight)]
    expected = held[0].double() @ held[1].double().t()
    found = operators.linear(x, operators.linear_weight(weight)).cpu().double()
    return {"probes": probes, "linear_max_abs_error": float((found - expected).abs().max())}


def kernels(dtype: str) -> list[dict[str, Any]]:
    operators, held, found = TritonOperators(dtype), torch.bfloat16 if dtype == "bf16" else torch.float32, []
    for n, k in SHAPES:
        weight = operators.linear_weight(torch.randn(n, k))
        for rows in ROWS:
            x = torch.randn(rows, k, device="cuda")
            low = x.to(held)
            ours, torchs = timed(lambda: operators.linear(x, weight)), timed(lambda: low @ weight.data.t())  # noqa: B023
            found.append({"operator": "linear", "n": n, "k": k, "rows": rows, "ms": ours, "ratio": ours / torchs})
    for context in (512, 4096):
        pages = -(-context // PAGE)
        keys, values = (torch.randn(pages, 3, PAGE, 64, device="cuda") for _ in range(2))
        batch = RaggedBatch.build([Span(0, [0], context - 1, list(range(pages)))])
        query = torch.randn(1, 9, 64, device="cuda")
        flat = keys.transpose(0, 1).reshape(1, 3, -1, 64)

        def stock(query: Any = query, flat: Any = flat) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(query[:, :, None], flat, flat, enable_gqa=True)

        ours = timed(lambda: operators.attention(query, keys, values, batch, scale=0.125))  # noqa: B023
        found.append({"operator": "attention", "context": context, "ms": ours, "ratio": ours / timed(stock)})
    x, weight = torch.randn(256, 576, device="cuda"), torch.rand(576, device="cuda")
    pairs = {
        "rms_norm": (lambda: operators.rms_norm(x, weight, 1e-6), lambda: torch.rms_norm(x, (576,), weight, 1e-6)),
        "log_softmax": (lambda: operators.log_softmax(x), lambda: torch.log_softmax(x, -1)),
    }
    for name, (one, other) in pairs.items():
        ours = timed(one)
        found.append({"operator": name, "ms": ours, "ratio": ours / timed(other)})
    return found


def model(reference: str, dtype: str) -> dict[str, Any]:
    with gnomon.load(reference, device="cuda", profile=dtype, speculation="off") as opened:
        certificate = opened.certificate(renew=True)
        found: dict[str, Any] = {"fingerprint": opened.fingerprint, "certified": certificate.passed}
        for count in (1, 16, 64):
            prompts = ["Tell me about the sea."] * count
            opened.generate(prompts, max_tokens=8, temperature=0.0)
            started = time.perf_counter()
            opened.generate(prompts, max_tokens=128, temperature=0.0, ignore_eos=True)
            found[f"tokens_per_second_{count}"] = 128 * count / (time.perf_counter() - started)
        return found


def vllm(reference: str) -> dict[str, Any]:
    """vLLM in processes of its own, plain and batch-invariant; empty where it is not installed."""
    found = {}
    for name, invariant in (("plain", "0"), ("batch_invariant", "1")):
        for count in (1, 16, 64):
            run = subprocess.run(
                [sys.executable, "-c", VLLM, reference, str(count)],
                env={**os.environ, "VLLM_BATCH_INVARIANT": invariant},
                capture_output=True,
                text=True,
            )
            seconds = re.search(r"SECONDS ([\d.]+)", run.stdout)
            if seconds is None:
                return {"not_run": run.stderr.strip().splitlines()[-1:]}
            found[f"{name}_tokens_per_second_{count}"] = 128 * count / float(seconds[1])
    return found


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("No CUDA device here: this script certifies and times real hardware only.")
    reference = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    device = torch.cuda.get_device_name()
    found: dict[str, Any] = {"device": device, "torch": torch.__version__, "gnomon": gnomon.__version__}
    file = RESULTS / f"gpu-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    for dtype in ("fp32", "bf16"):
        found[dtype] = {"certify": certify(dtype), "kernels": kernels(dtype), "model": model(reference, dtype)}
        file.write_text(json.dumps(found, indent=1) + "\n")
    found["vllm"] = vllm(reference)
    file.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
