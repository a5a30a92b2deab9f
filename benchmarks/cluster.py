"""Requests to replicas under Ray, one of which is killed on the way: how many answers differ from a lone engine's?

Usage: python benchmarks/cluster.py MODEL [REPLICAS] [REQUESTS]. Writes benchmarks/results/cluster.json.
"""

from __future__ import annotations

import asyncio
import json
import os
import platform
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import ray
import uvicorn

import gnomon
from gnomon.recipe import ServeOptions
from gnomon.serve.replicas import RayFleet
from gnomon.serve.router import create_router
from gnomon.serve.run import address, bind

FILE = Path(__file__).parent / "results" / "cluster.json"
CLIENTS, KINDS, TOKENS = 16, 50, 16


def options(place: int) -> dict[str, Any]:
    return {"prompt": f"Number {place % KINDS}:", "max_tokens": TOKENS, "seed": place % KINDS, "temperature": 1.0}


def main() -> None:
    reference = sys.argv[1] if len(sys.argv) > 1 else "smollm2-135m-instruct"
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 3
    requests = int(sys.argv[3]) if len(sys.argv) > 3 else 500
    loading = {"threads": 1, "max_sequences": 16, "ledger": False}
    with gnomon.load(reference, **loading) as model:
        expected = [model.generate(**options(place)).text for place in range(KINDS)]
    started = time.perf_counter()
    fleet = RayFleet(count, reference, loading, ServeOptions(served_name="model"))
    fleet.wait()
    ready = time.perf_counter() - started
    app, listener = create_router(fleet), bind(ServeOptions(port=0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", access_log=False))
    threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True).start()
    while not server.started:
        time.sleep(0.05)
    url, done = address(listener), 0

    def ask(place: int) -> tuple[bool, str]:
        nonlocal done
        content = {"model": "model", "stream": bool(place % 2), **options(place)}
        with httpx.stream("POST", f"{url}/v1/completions", json=content, timeout=600) as reply:
            lines = list(reply.iter_lines())
        done += 1
        if not place % 2:
            return reply.status_code == 200, json.loads("".join(lines))["choices"][0]["text"]
        events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        return reply.status_code == 200, "".join(e["choices"][0]["text"] for e in events if e.get("choices"))

    def kill() -> None:
        while done < requests // 4:
            time.sleep(0.05)
        os.kill(fleet.process_ids()[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    started = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(ask, range(requests)))
    seconds = time.perf_counter() - started
    killer.join()
    counts = vars(app.state.router.counts)
    result = {
        "model": Path(reference).name,
        "replicas": count,
        "requests": requests,
        "streamed": requests // 2,
        "failed": sum(not fine for fine, _ in found),
        "differing": sum(text != expected[place % KINDS] for place, (_, text) in enumerate(found)),
        "killed": 1,
        "router": counts,
        "seconds": round(seconds, 1),
        "seconds_to_ready": round(ready, 1),
        "machine": {"processor": platform.machine(), "cpus": os.cpu_count(), "load": os.getloadavg()[0]},
        "ray": ray.__version__,
        "gnomon": gnomon.__version__,
    }
    server.should_exit = True
    fleet.close()
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
