"""The ensemble beside peers. Writes benchmarks/results/ensemble-peers.json.

    python benchmarks/ensemble_peers.py setup      .bench/genlm: genlm-bytes 0.2.0 over this environment's torch
    python benchmarks/ensemble_peers.py bytes      next-byte probabilities beside genlm-bytes', same weights
    python benchmarks/ensemble_peers.py averaging  two models of one vocabulary beside a plain transformers loop

bytes: total variation distance of the 256 next bytes at places of some texts, and seconds. averaging: greedy text and
ms per token, alternating in one process.
"""

from __future__ import annotations

import json
import os
import platform
import site
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".bench" / "genlm"
EXPORTED = ROOT / ".bench" / "smollm2"
RESULTS = ROOT / "benchmarks" / "results" / "ensemble-peers.json"
MODEL = "smollm2-135m-instruct"
TEXTS = (
    "The old clockmaker kept every watch that nobody came back for.",
    "Die Bibliothek bleibt wegen Bauarbeiten geschlossen.",
    "def steps(count):\n    return [step for step in range(count)]",
)
EVERY, BEAM = 9, 8
PEER = """
import asyncio, json, sys, time
from genlm.backend import load_model_by_name
from genlm.bytes import BeamParams, ByteBeamState

async def main():
    folder, texts, every, beam = json.loads(sys.argv[1])
    llm = load_model_by_name(folder, backend="hf")
    found = []
    for text in texts:
        data = text.encode()
        for end in range(every, len(data), every):
            started = time.perf_counter()
            state = await ByteBeamState.initial(llm, BeamParams(K=beam))
            state = await state.prefill(data[:end])
            chances = await state.logp_next()
            found.append([time.perf_counter() - started, [float(p) for p in chances.ps]])
    print("FOUND" + json.dumps(found))

asyncio.run(main())
"""


def setup() -> None:
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER)], check=True)
    (own,) = FOLDER.glob("lib/python*/site-packages")
    shared = [path for path in sys.path if path.endswith("site-packages")] + site.getsitepackages()
    (own / "shared.pth").write_text("\n".join(dict.fromkeys(shared)) + "\n")
    subprocess.run([FOLDER / "bin" / "pip", "install", "-q", "genlm-bytes==0.2.0"], check=True)


def exported() -> Path:
    """The zoo's model as a directory that transformers reads: the same numbers in float32."""
    if not (EXPORTED / "config.json").exists():
        from transformers import AutoTokenizer

        import gnomon

        with gnomon.load(MODEL, profile="fp32", ledger=False) as model:
            file = Path(str(model.checkpoint.path))
            with model.module() as module:
                module.save_pretrained(EXPORTED)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(EXPORTED)
    return EXPORTED


def next_bytes() -> None:
    from gnomon.ensemble import Ensemble

    question = json.dumps([str(exported()), TEXTS, EVERY, BEAM])
    reply = subprocess.run(
        [FOLDER / "bin" / "python", "-c", PEER, question], capture_output=True, text=True, check=False
    )
    if "FOUND" not in reply.stdout:
        sys.exit(reply.stderr[-3000:])
    theirs = json.loads(reply.stdout.split("FOUND")[1])
    found: dict[str, Any] = {"places": len(theirs), "beam": BEAM}
    found["genlm_seconds"] = statistics.median(seconds for seconds, _ in theirs)
    for mode in ("beam", "canonical"):
        with Ensemble([str(EXPORTED)], core="byte", mode=mode, beam=BEAM, profile="fp32", ledger=False) as ours:
            distances, seconds, agree, place = [], [], 0, 0
            for text in TEXTS:
                data = text.encode()
                for end in range(EVERY, len(data), EVERY):
                    started = time.perf_counter()
                    mine = np.array(ours.next_bytes(data[:end]))[:256]
                    seconds.append(time.perf_counter() - started)
                    other = np.exp(np.array(theirs[place][1]))[:256]
                    distances.append(0.5 * np.abs(mine / mine.sum() - other / other.sum()).sum())
                    agree += int(mine.argmax() == other.argmax())
                    place += 1
        found[mode] = {
            "median_distance": float(np.median(distances)),
            "greatest_distance": float(np.max(distances)),
            "same_likeliest_byte": agree,
            "seconds": statistics.median(seconds),
        }
    keep("next_bytes", found)


def averaging() -> None:
    from transformers import AutoModelForCausalLM

    import gnomon
    from gnomon.ensemble import Ensemble

    first = exported()
    second = EXPORTED.with_name("smollm2-changed")
    if not (second / "config.json").exists():
        changed = AutoModelForCausalLM.from_pretrained(first)
        generator = torch.Generator().manual_seed(1)
        for name, weight in changed.named_parameters():
            if "down_proj" in name:
                weight.data += 0.02 * weight.data.std() * torch.randn(weight.shape, generator=generator)
        changed.save_pretrained(second)
        for file in first.glob("*token*"):
            (second / file.name).write_bytes(file.read_bytes())
    modules = [AutoModelForCausalLM.from_pretrained(path).eval() for path in (first, second)]
    with (
        Ensemble([str(first), str(second)], profile="fp32", ledger=False) as ours,
        gnomon.load(str(first), profile="fp32", ledger=False) as plain,
    ):
        prompt, count = "The keeper of the lighthouse climbed", 32
        ids = plain.encode(prompt)

        @torch.no_grad()
        def loop() -> tuple[float, list[int]]:
            caches: list[Any] = [None, None]
            fed, out, started = torch.tensor([ids]), [], 0.0
            for _ in range(count):
                total = 0.0
                for place, module in enumerate(modules):
                    reply = module(fed, past_key_values=caches[place], use_cache=True)
                    caches[place] = reply.past_key_values
                    total = total + torch.softmax(reply.logits[0, -1], -1)
                out.append(int(total.argmax()))  # type: ignore[union-attr]
                fed = torch.tensor([[out[-1]]])
                started = started or time.perf_counter()  # the prompt's own time is left out
            return 1000 * (time.perf_counter() - started) / (count - 1), out

        def mine() -> tuple[float, list[int]]:
            started, out = 0.0, []
            for chunk in ours.stream(prompt, max_tokens=count, ignore_eos=True):
                out += chunk.token_ids
                started = started or (time.perf_counter() if out else 0.0)
            return 1000 * (time.perf_counter() - started) / (count - 1), out

        loop(), mine()
        rounds = [(loop(), mine()) for _ in range(5)]
    ratios = sorted(theirs[0] / own[0] for theirs, own in rounds)
    keep(
        "averaging",
        {
            "transformers_ms": statistics.median(theirs[0] for theirs, _ in rounds),
            "gnomon_ms": statistics.median(own[0] for _, own in rounds),
            "times_faster": statistics.median(ratios),
            "spread": [ratios[0], ratios[-1]],
            "same_tokens": all(theirs[1] == own[1] for theirs, own in rounds),
            "tokens": count,
        },
    )


def keep(section: str, found: dict[str, Any]) -> None:
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    machine = {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]}
    everything[section] = {"machine": machine, **found}
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")
    print(json.dumps(found))


if __name__ == "__main__":
    {"setup": setup, "bytes": next_bytes, "averaging": averaging}[sys.argv[1]]()
