"""Where a server's memory goes: 200 streaming clients that leave at random, on the real model, the heap looked into.

Sampled after each part, when nobody is left: resident memory; key-value pages ever handed out; what the C library's
heap holds in use and free (mallinfo2); Python objects. At the end the heap's free memory is given back.
Usage: python benchmarks/memory.py [--profile fp32] [--seconds 150]. Writes benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

import gnomon
from gnomon.engine.memory import give_back

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.server import serving  # noqa: E402
from helpers.soak import soak  # noqa: E402

MODEL, CLIENTS, PARTS = "smollm2-135m-instruct", 200, 5


class HeapState(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def heap() -> HeapState:
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = HeapState
    state: HeapState = library.mallinfo2()
    return state


def sample(model: gnomon.Model, handed_out: set[int], started: float) -> dict[str, Any]:
    gc.collect()
    state, stats = heap(), model.stats()
    return {
        "seconds": round(time.monotonic() - started),
        "resident_MB": round(psutil.Process().memory_info().rss / 1e6, 1),
        "pages_ever_handed_out": len(handed_out),
        "heap_in_use_MB": round(state.uordblks / 1e6, 1),
        "heap_free_MB": round(state.fordblks / 1e6, 1),
        "python_objects": len(gc.get_objects()),
        "left": [stats.running, stats.waiting, stats.pages_used],
    }


def clients(url: str, seconds: float) -> None:
    """Another process's work: its memory is not the server's."""
    seen = asyncio.run(soak(url, "m", clients=CLIENTS, seconds=seconds))
    print(json.dumps({"finished": seen.finished, "left_early": seen.left_early, "failed": len(seen.failed)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default="fp32")
    parser.add_argument("--seconds", type=float, default=150)
    parser.add_argument("--clients-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.clients_of:
        clients(arguments.clients_of, arguments.seconds)
        return
    started = time.monotonic()
    with gnomon.load(MODEL, profile=arguments.profile) as model:
        pool = model.worker._engine.pool
        allocate, handed_out = pool.allocate, set[int]()

        def counting() -> int | None:
            if (page := allocate()) is not None:
                handed_out.add(page)
            return page

        pool.allocate = counting  # type: ignore[method-assign]
        with serving({"m": model}) as url:
            samples, seen = [sample(model, handed_out, started)], []
            for _ in range(PARTS):
                command = [sys.executable, __file__, "--clients-of", url, "--seconds", str(arguments.seconds / PARTS)]
                seen.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
                while model.stats().running or model.stats().waiting:
                    time.sleep(0.2)
                samples.append(sample(model, handed_out, started))
            give_back()
            trimmed = sample(model, handed_out, started)
        page = model.network.page_bytes if model.network is not None else 0
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    target = ROOT / "benchmarks" / "results" / "memory.json"
    result = json.loads(target.read_text()) if target.exists() else {}
    result[arguments.profile] = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} CPUs, load {psutil.getloadavg()[0]:.0f}",
        "commit": commit.stdout.strip(),
        "page_MB": round(page / 1e6, 2),
        "clients": {name: sum(part[name] for part in seen) for name in seen[0]},
        "samples": samples,
        "given_back": trimmed,
    }
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
