"""The engine's speed beside transformers' and llama.cpp's, on the same weights.

Usage: python benchmarks/engine.py [SECTION ...]; writes each section into benchmarks/results/engine.json. llama.cpp
takes part where llama-cpp-python 0.3.36 is installed: LLAMA_PYTHON names the interpreter that has it. Everybody works
in turn, round by round, so that what else the machine does hits all alike: ratios are medians of the rounds' own
ratios, rates are medians. On a machine that is busy with other work, --cpu counts the processor time of one thread
instead of the clock's: what others take is not counted, what they slow down is.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from engine_swapped import torch_in_place_of_ours

import gnomon
from gnomon.arch.module import hf_module
from gnomon.models.reference import open_checkpoint

ROOT = Path(__file__).parents[1]
TARGET = ROOT / "benchmarks" / "results" / "engine.json"
MODEL = "smollm2-135m-instruct"
DECODED, TOGETHER, PREFILLED = 64, 32, 1000
PROMPT = list(range(100, 116))
LONG = [(7919 * place) % 40_000 + 100 for place in range(PREFILLED)]
WEIGHT_BYTES = {"fp32": 538e6, "bf16": 269e6, "int8": 143e6}
"""What one decoded token reads: 134.5 million weights in the profile's form."""
LINEAR_FLOPS = 2 * 106.2e6
"""Of one prompt token: two for each weight of the layers (the head multiplies the last row only)."""

ATTENTION_FLOPS = 30 * 9 * 64 * 4 * (PREFILLED + 1) / 2
"""Of one prompt token on average: scores and weighted values, layers x heads x head size, keys up to its own."""


@dataclass
class How:
    """How it is measured: set once from the command line."""

    clock: Callable[[], float] = time.perf_counter
    rounds: int = 5
    threads: tuple[int, ...] = (1, 2)


HOW = How()
Work = Callable[[], float]
"""Does a fixed amount of work and gives its rate in tokens a second."""


class LlamaCpp:
    """llama.cpp in a process of its own interpreter: one line in, one rate out."""

    def __init__(self, threads: int) -> None:
        path = str(open_checkpoint(MODEL).file_path)
        script, counted = str(Path(__file__).with_name("engine_llama.py")), HOW.clock.__name__
        command = [os.environ["LLAMA_PYTHON"], script, path, str(threads), counted]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def rate(self, **work: Any) -> float:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(work) + "\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(30)


@contextmanager
def llama_cpp(threads: int) -> Iterator[LlamaCpp | None]:
    if "LLAMA_PYTHON" not in os.environ:
        yield None
        return
    peer = LlamaCpp(threads)
    try:
        yield peer
    finally:
        peer.close()


def rate(tokens: int, work: Callable[[], Any]) -> float:
    started = HOW.clock()
    work()
    return tokens / (HOW.clock() - started)


def in_turn(runs: dict[str, Work], rounds: int | None = None) -> dict[str, list[float]]:
    """Everybody once to warm up, then round by round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for number in range((rounds or HOW.rounds) + 1):
        for name, run in runs.items():
            value = run()
            if number:
                rates[name].append(value)
    return rates


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), digits),
        "min": round(min(values), digits),
        "max": round(max(values), digits),
    }


def ratios(rates: dict[str, list[float]], pairs: dict[str, tuple[str, str]]) -> dict[str, dict[str, float]]:
    return {
        name: summary([a / b for a, b in zip(rates[ours], rates[theirs], strict=True)], 2)
        for name, (ours, theirs) in pairs.items()
        if ours in rates and theirs in rates
    }


def report(rates: dict[str, list[float]], pairs: dict[str, tuple[str, str]]) -> dict[str, Any]:
    return {"rates": {name: summary(values) for name, values in rates.items()}, "ratios": ratios(rates, pairs)}


def ours(profile: str, threads: int, **options: Any) -> gnomon.Model:
    options = {"speculation": "off", "ledger": False, **options}
    return gnomon.load(MODEL, profile=profile, threads=threads, **options)


def theirs() -> dict[str, Any]:
    """transformers modules over the same weights."""
    with gnomon.load(MODEL, kernel="torch", ledger=False, kv_memory=64 << 20) as base:
        assert base.network is not None
        fp32 = hf_module(base.network, base.checkpoint)
        bf16 = transformers.AutoModelForCausalLM.from_config(fp32.config, dtype=torch.bfloat16)
        bf16.load_state_dict(fp32.state_dict())
        return {"fp32": fp32.eval(), "bf16": bf16.eval()}


def generated(module: Any, prompts: list[list[int]], tokens: int) -> None:
    options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    with torch.inference_mode():
        module.generate(torch.tensor(prompts), attention_mask=torch.ones(len(prompts), len(prompts[0])), **options)


def read_bandwidth(threads: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "machine"
        source = Path(__file__).with_name("machine.cpp")
        subprocess.run(["g++", "-O3", "-march=native", "-w", str(source), "-o", program, "-pthread"], check=True)
        output = subprocess.run([program, str(threads)], capture_output=True, text=True, check=True).stdout
        return float(output)


def matrix_rate(threads: int) -> float:
    """torch's float32 product at a size that suits it, in GFLOP/s: the best of several."""
    torch.set_num_threads(threads)
    x, w = torch.randn(512, 576), torch.randn(1536, 576)
    return max(rate(2 * x.numel() * len(w), lambda: torch.nn.functional.linear(x, w)) for _ in range(30)) * 1e-9


def decode() -> dict[str, Any]:
    """One sequence, greedy."""
    result: dict[str, Any] = {"work": f"{len(PROMPT)} prompt tokens, {DECODED} decoded, batch 1, greedy; tokens/s"}
    modules = theirs()
    for threads in HOW.threads:
        runs: dict[str, Work] = {}
        models = {profile: ours(profile, threads) for profile in ("fp32", "bf16", "int8", "gguf")}
        for profile, model in models.items():
            runs[f"gnomon {profile}"] = lambda m=model: rate(
                DECODED, lambda: m.generate(PROMPT, max_tokens=DECODED, ignore_eos=True)
            )
        for dtype, module in modules.items():
            runs[f"transformers {dtype}"] = lambda m=module: rate(DECODED, lambda: generated(m, [PROMPT], DECODED))
        with llama_cpp(threads) as peer:
            if peer is not None:
                runs["llama.cpp Q4_1"] = lambda p=peer: p.rate(decode=DECODED, prompts=[PROMPT])
            by_the_clock = HOW.clock is time.perf_counter  # bandwidth is; processor time cannot be compared with it
            bandwidth = [read_bandwidth(threads)] if by_the_clock else []
            rates = in_turn(runs)
            bandwidth += [read_bandwidth(threads)] if by_the_clock else []
        pairs = {f"{d}: gnomon / transformers": (f"gnomon {d}", f"transformers {d}") for d in ("fp32", "bf16")}
        pairs["gguf: gnomon / llama.cpp"] = ("gnomon gguf", "llama.cpp Q4_1")
        found = report(rates, pairs)
        if bandwidth:
            found["read_bandwidth_GB_s, before and after"] = bandwidth
            found["share_of_bandwidth"] = {
                profile: round(statistics.median(rates[f"gnomon {profile}"]) * size / max(bandwidth) * 1e-9, 2)
                for profile, size in WEIGHT_BYTES.items()
            }
        result[f"{threads} thread(s)"] = found
        for model in models.values():
            model.close()
    return result


def prefill() -> dict[str, Any]:
    """A prompt of 1,000 tokens and the one token after it."""
    threads, runs, number = HOW.threads[-1], {}, iter(range(1, 10**6))

    def cold() -> list[int]:
        return [next(number) % 40_000, *LONG[1:]]  # another first token: nothing of it is in the prefix cache

    models = {profile: ours(profile, threads) for profile in ("fp32", "bf16", "int8", "gguf")}
    for profile, model in models.items():
        runs[f"gnomon {profile}"] = lambda m=model: rate(
            PREFILLED, lambda: m.generate(cold(), max_tokens=1, ignore_eos=True)
        )
    for dtype, module in theirs().items():
        runs[f"transformers {dtype}"] = lambda m=module: rate(PREFILLED, lambda: generated(m, [cold()], 1))
    with llama_cpp(threads) as peer:
        if peer is not None:
            runs["llama.cpp Q4_1"] = lambda: peer.rate(decode=1, prompts=[cold()])
        peak = [matrix_rate(threads)]
        rates = in_turn(runs)
        peak.append(matrix_rate(threads))
    for model in models.values():
        model.close()
    pairs = {f"{d}: gnomon / transformers": (f"gnomon {d}", f"transformers {d}") for d in ("fp32", "bf16")}
    pairs["int8: gnomon / transformers bf16"] = ("gnomon int8", "transformers bf16")
    pairs["gguf: gnomon / transformers bf16"] = ("gnomon gguf", "transformers bf16")
    pairs["gguf: gnomon / llama.cpp"] = ("gnomon gguf", "llama.cpp Q4_1")
    found = {"work": f"{PREFILLED} prompt tokens and one more, {threads} threads; tokens/s", **report(rates, pairs)}
    found["torch_fp32_matrix_GFLOP_s, before and after"] = [round(value, 1) for value in peak]
    for kind, flops in (
        ("layers' products only", LINEAR_FLOPS),
        ("products and attention", LINEAR_FLOPS + ATTENTION_FLOPS),
    ):
        found[f"share_of_matrix_rate, {kind}"] = {
            d: round(statistics.median(rates[f"gnomon {d}"]) * flops * 1e-9 / max(peak), 2) for d in ("fp32", "bf16")
        }
    return found


def concurrent() -> dict[str, Any]:
    """Sixteen sequences at once."""
    threads, count = HOW.threads[-1], 16
    prompts = [[100 + 7 * n + place for place in range(16)] for n in range(count)]
    runs: dict[str, Work] = {}
    models = {profile: ours(profile, threads) for profile in ("bf16", "int8", "gguf")}
    for profile, model in models.items():
        runs[f"gnomon {profile}"] = lambda m=model: rate(
            count * TOGETHER, lambda: m.generate(prompts, max_tokens=TOGETHER, ignore_eos=True)
        )
    module = theirs()["bf16"]
    runs["transformers bf16"] = lambda: rate(count * TOGETHER, lambda: generated(module, prompts, TOGETHER))
    with llama_cpp(threads) as peer:
        if peer is not None:
            runs["llama.cpp Q4_1"] = lambda: peer.rate(decode=TOGETHER, prompts=prompts)
        rates = in_turn(runs)
    for model in models.values():
        model.close()
    pairs = {"gguf: gnomon / llama.cpp, batched": ("gnomon gguf", "llama.cpp Q4_1")}
    pairs |= {f"{p}: gnomon / transformers bf16": (f"gnomon {p}", "transformers bf16") for p in models}
    return {"work": f"{count} sequences of {TOGETHER} tokens, {threads} threads; tokens/s", **report(rates, pairs)}


def prefix() -> dict[str, Any]:
    """Time to the first token of a 1,000-token prompt that was seen before, over that of one that was not."""
    shares: dict[str, list[float]] = {}
    for profile in ("fp32", "gguf"):
        with ours(profile, HOW.threads[-1]) as model:
            for number in range(HOW.rounds):
                prompt = [number + 5, *LONG[1:]]
                cold = 1 / rate(1, lambda p=prompt: model.generate(p, max_tokens=1, ignore_eos=True))
                warm = 1 / rate(1, lambda p=prompt: model.generate(p, max_tokens=1, ignore_eos=True))
                shares.setdefault(profile, []).append(warm / cold)
    return {"work": f"{PREFILLED} tokens; warm time / cold time", **{p: summary(v, 3) for p, v in shares.items()}}


def speculation() -> dict[str, Any]:
    """Text that repeats itself, with guesses and without."""
    prompt = [220, 504, 2365, 6354, 16438, 22582, 690, 260, 23790, 2767, 30] * 12
    result: dict[str, Any] = {"work": "96 tokens after a sentence said twelve times, 2 threads; with / without"}
    for profile in ("fp32", "gguf"):
        with ours(profile, HOW.threads[-1]) as plain, ours(profile, HOW.threads[-1], speculation="lookup") as guessing:
            for temperature in (0.0, 0.8):
                options = {"max_tokens": 96, "ignore_eos": True, "temperature": temperature, "seed": 1}
                texts: dict[str, list[int]] = {}

                def run(name: str, model: gnomon.Model, o: dict[str, Any], kept: dict[str, list[int]]) -> float:
                    return rate(96, lambda: kept.update({name: model.generate(prompt, **o).token_ids}))

                rates = in_turn(
                    {
                        "without": lambda o=options, t=texts, m=plain: run("without", m, o, t),
                        "with": lambda o=options, t=texts, m=guessing: run("with", m, o, t),
                    },
                    3,
                )
                found = ratios(rates, {"speed": ("with", "without")})["speed"]
                result[f"{profile}, temperature {temperature}"] = {
                    **found,
                    "identical": texts["with"] == texts["without"],
                }
    return result


def operators() -> dict[str, Any]:
    """The canonical products and attention against torch's own in the same engine, operator by operator."""
    result: dict[str, Any] = {"work": "fp32, 2 threads, layers operator by operator in both; canonical / torch's own"}
    with ours("fp32", HOW.threads[-1]) as canonical, ours("fp32", HOW.threads[-1]) as swapped:
        for model, replace in ((canonical, False), (swapped, True)):
            torch_in_place_of_ours(model, replace=replace)
        for count in (1, 16):
            prompts = [[100 + 7 * n + place for place in range(16)] for n in range(count)]
            runs: dict[str, Work] = {
                name: lambda m=model, p=prompts: rate(
                    16 * len(p), lambda: m.generate(p, max_tokens=16, ignore_eos=True)
                )
                for name, model in (("canonical", canonical), ("torch's own", swapped))
            }
            result[f"batch {count}"] = report(in_turn(runs, 4), {"speed": ("canonical", "torch's own")})
    return result


QUESTIONS = [
    *(f"What is the capital of {place}?" for place in ("Japan", "Peru", "Kenya", "Norway")),
    *(f"Explain {thing} to a child." for thing in ("gravity", "rain", "money", "magnets")),
    *(f"Write a short story about {thing}." for thing in ("a lighthouse", "a lost key", "two rivers", "a robot")),
    *(f"List five facts about {thing}." for thing in ("the Moon", "bees", "Rome", "glass")),
    *(f"How do I {task}?" for task in ("boil an egg", "sort a list in Python", "plant a tree", "learn to swim")),
    *(f"{sum_} Think step by step." for sum_ in ("What is 17 + 26?", "What is 9 times 8?", "What is half of 130?")),
]


def profiles() -> dict[str, Any]:
    """How far each profile changes greedy text: on fp32's own answers, how often another token would have been next."""
    answers: list[tuple[list[int], int]] = []
    found: dict[str, Any] = {"work": f"{len(QUESTIONS)} questions, fp32's greedy answers of up to 96 tokens"}
    with ours("fp32", HOW.threads[-1]) as model:
        for question in QUESTIONS:
            prompt = model.render(question)
            made = model.generate(prompt, max_tokens=96).token_ids
            answers.append(([*prompt, *made], len(prompt)))
        expected = [model.logits(ids)[start - 1 : -1] for ids, start in answers]

    def compared(name: str, logits: Callable[[list[int]], torch.Tensor]) -> None:
        other, whole, divergence, count = 0, 0, 0.0, 0
        for (ids, start), own in zip(answers, expected, strict=True):
            theirs_ = logits(ids)[start - 1 : -1].float()
            differs = (theirs_.argmax(-1) != own.argmax(-1)).sum().item()
            kl = torch.nn.functional.kl_div(
                theirs_.log_softmax(-1), own.log_softmax(-1), reduction="sum", log_target=True
            )
            other, whole, divergence, count = (
                other + differs,
                whole + (differs == 0),
                divergence + kl.item(),
                count + len(own),
            )
        found[name] = {
            "other next token": round(other / count, 4),
            "answers unchanged": f"{whole} of {len(answers)}",
            "KL from fp32, nats a token": float(f"{divergence / count:.3g}"),
        }

    for profile in ("bf16", "int8", "gguf"):
        with ours(profile, HOW.threads[-1]) as model:
            compared(f"gnomon {profile}", model.logits)
    stock = theirs()["bf16"]
    with torch.inference_mode():
        compared("transformers bf16", lambda ids: stock(torch.tensor([ids])).logits[0])
    return found


SECTIONS = {f.__name__: f for f in (decode, prefill, concurrent, prefix, speculation, operators, profiles)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="*", choices=[*SECTIONS, []], default=list(SECTIONS))
    parser.add_argument("--cpu", action="store_true", help="processor time of one thread in place of the clock's")
    parser.add_argument("--rounds", type=int, default=HOW.rounds)
    arguments = parser.parse_args()
    chosen = arguments.sections
    HOW.rounds = arguments.rounds
    if arguments.cpu:
        HOW.clock, HOW.threads = time.process_time, (1,)
    result: dict[str, Any] = json.loads(TARGET.read_text()) if TARGET.exists() else {}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    for name in chosen:
        load = os.getloadavg()[0]
        found = SECTIONS[name]()
        result[name] = {
            **found,
            "counted": "processor time, one thread" if arguments.cpu else "the clock's time",
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {os.cpu_count()} CPUs, "
            f"load {load:.0f} before and {os.getloadavg()[0]:.0f} after",
            "versions": f"torch {torch.__version__}, transformers {transformers.__version__}",
            "commit": commit.stdout.strip(),
        }
        TARGET.write_text(json.dumps(result, indent=2) + "\n")
        print(json.dumps({name: result[name]}, indent=2), flush=True)


if __name__ == "__main__":
    sys.exit(main())
