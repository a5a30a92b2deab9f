"""The server's figures: start to first token, `--help`, health while 32 requests decode, 200 clients that leave.

Everything runs as separate processes on this machine, on the real default model (fetched beforehand).
Usage: python benchmarks/serve.py [--soak-seconds 120]. Writes benchmarks/results/serve.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.soak import SoakResult, soak  # noqa: E402

MODEL = "smollm2-135m-instruct"
MESSAGES = [{"role": "user", "content": "Tell me about sundials."}]


@contextmanager
def server() -> Iterator[tuple[str, subprocess.Popen[str], float]]:
    """A `gnomon serve` process: its address, itself, and when it was started."""
    started = time.monotonic()
    command = [sys.executable, "-m", "gnomon", "serve", MODEL, "--port", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    address = ""
    for line in process.stderr:
        if "studio" in line:
            address = line.split()[1].rstrip("/")
        if line.startswith("Ready"):
            break
    try:
        yield address, process, started
    finally:
        process.terminate()
        process.wait(30)


def first_token() -> float:
    """Seconds from starting the process to the first streamed text."""
    with server() as (url, _, started):
        body = {"model": MODEL, "messages": MESSAGES, "stream": True, "max_tokens": 4}
        with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as reply:
            for line in reply.iter_lines():
                if '"content":"' in line and '"content":""' not in line:
                    return time.monotonic() - started
    raise RuntimeError("no text came")


def help_seconds() -> float:
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "gnomon", "--help"], capture_output=True, check=True)
    return time.monotonic() - started


def health_while_decoding(url: str, requests: int = 32) -> list[float]:
    """Response times of /healthz, in seconds, while `requests` chats decode."""
    body = {"model": MODEL, "messages": MESSAGES, "max_tokens": 48, "ignore_eos": True}
    threads = [
        threading.Thread(target=httpx.post, args=(f"{url}/v1/chat/completions",), kwargs={"json": body, "timeout": 600})
        for _ in range(requests)
    ]
    for thread in threads:
        thread.start()
    times = []
    with httpx.Client() as http:
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            http.get(f"{url}/healthz")
            times.append(time.monotonic() - started)
            time.sleep(0.05)
    return times


def spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    return {
        "min": round(ordered[0], 4),
        "median": round(statistics.median(ordered), 4),
        "p99": round(ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 4),
        "max": round(ordered[-1], 4),
        "count": len(ordered),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--soak-seconds", type=float, default=120)
    seconds = parser.parse_args().soak_seconds
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    result: dict[str, Any] = {
        "machine": f"{platform.machine()}, {psutil.cpu_count()} CPUs, torch {torch.__version__}",
        "commit": commit.stdout.strip(),
        "help_seconds": spread([help_seconds() for _ in range(9)]),
        "start_to_first_token_seconds": spread([first_token() for _ in range(3)]),
    }
    with server() as (url, process, _):
        result["health_seconds_while_32_decode"] = spread(health_while_decoding(url))
        watched = psutil.Process(process.pid)
        asyncio.run(soak(url, MODEL, clients=200, seconds=seconds / 3))  # until the pages in use have been touched
        time.sleep(3)
        memory = [watched.memory_info().rss]
        seen = SoakResult()
        for _ in range(4):
            part = asyncio.run(soak(url, MODEL, clients=200, seconds=seconds / 4))
            time.sleep(3)
            memory.append(watched.memory_info().rss)
            seen = seen.plus(part)
        metrics = httpx.get(f"{url}/metrics").text
        left = {
            line.split("{")[0].removeprefix("gnomon:"): float(line.rsplit(" ", 1)[1])
            for line in metrics.splitlines()
            if line.startswith(("gnomon:num_requests", "gnomon:kv_cache_usage"))
        }
        result["soak"] = {
            "clients": 200,
            "seconds": seconds,
            "finished": seen.finished,
            "left_early": seen.left_early,
            "refused": seen.refused,
            "failed": len(seen.failed),
            "health_seconds": spread(seen.health_seconds),
            "memory_MB": [round(size / 1e6, 1) for size in memory],
            "left_in_the_engine": left,
        }
    target = ROOT / "benchmarks" / "results" / "serve.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
