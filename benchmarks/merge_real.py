"""Whole commands on models of 135M parameters: wall time and peak memory beside mergekit, and kills. See merge.py."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_bench import OURS, PEER, RESULTS, WORK, put
from safetensors.torch import save_file

from gnomon.models.reference import open_checkpoint


def big_models() -> dict[str, Path]:
    """SmolLM2-135M in bf16 and three variants with seeded noise on every weight."""
    folder = WORK / "135m"
    names = ["base", "one", "two", "three"]
    if all((folder / name / "config.json").exists() for name in names):
        return {name: folder / name for name in names}
    checkpoint = open_checkpoint("smollm2-135m-instruct")
    config = {**checkpoint.config, "torch_dtype": "bfloat16"}
    for k, name in enumerate(names):
        path = folder / name
        path.mkdir(parents=True, exist_ok=True)
        generator, tensors = torch.Generator().manual_seed(k), {}
        for tensor in checkpoint:
            weight = checkpoint[tensor].float()
            noise = weight.std() * 0.02 * torch.randn(weight.shape, generator=generator) if k else 0.0
            tensors[tensor] = (weight + noise).to(torch.bfloat16)
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        checkpoint.tokenizer().backend.save(str(path / "tokenizer.json"))
        (path / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
        (path / "config.json").write_text(json.dumps(config))
    return {name: folder / name for name in names}


def big_file(method: str) -> Path:
    """The merge file of one timing."""
    models = big_models()
    names = ["one"] if method == "slerp" else ["one", "two", "three"]
    entries: list[dict[str, Any]] = [{"model": str(models[n])} for n in names]
    content: dict[str, Any] = {"merge_method": method, "models": entries}
    if method != "linear":
        content["base_model"] = str(models["base"])
    if method == "slerp":
        entries.append({"model": str(models["base"])})
        content["parameters"] = {"t": 0.4}
    if method in ("linear", "ties", "dare_ties"):
        for entry, weight in zip(entries, (0.5, 0.3, 0.3), strict=True):
            entry["parameters"] = {"weight": weight} | ({"density": 0.5} if method != "linear" else {})
    path = WORK / "135m" / f"{method}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def timed(command: list[str]) -> tuple[float, float, float]:
    """(wall seconds, CPU seconds, peak memory in MB) of a process.

    The peak is the system's high-water mark of the process itself, read while it runs: the one that wait4 gives begins
    with this script's own size.
    """
    started, peak = time.perf_counter(), 0.0
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        peak = max(peak, high_water_mark(process.pid))
        time.sleep(0.02)
    if status:
        raise SystemExit(f"{command} failed")
    return time.perf_counter() - started, usage.ru_utime + usage.ru_stime, peak


def high_water_mark(pid: int) -> float:
    """Most resident memory so far, in MB; 0 for a process that is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM")), 0.0)


def speed(rounds: int = 3, methods: tuple[str, ...] = ("ties", "dare_ties", "linear", "slerp", "model_stock")) -> None:
    """Whole commands, alternating; ours with --max-memory 1GB."""
    found = {}
    path = RESULTS / "merge_speed.json"
    if path.exists():
        found = json.loads(path.read_text()).get("methods", {})
    for method in methods:
        file, out = big_file(method), WORK / "135m" / "out"
        rows = []
        for _ in range(rounds):
            pair = []
            for command in (
                [*OURS, str(file), str(out), "--max-memory", "1GB"],
                ["env", "-u", "PYTHONPATH", str(PEER / "mergekit-yaml"), str(file), str(out), "--no-write-model-card"],
            ):
                shutil.rmtree(out, ignore_errors=True)
                pair.append(timed(command))
            rows.append(pair)
        ours, theirs = zip(*rows, strict=True)
        median = lambda runs, i: statistics.median(run[i] for run in runs)  # noqa: E731
        ratios = sorted(b[0] / a[0] for a, b in rows)
        found[method] = {
            "rounds": rounds, "ours_s": median(ours, 0), "mergekit_s": median(theirs, 0),
            "ratio": statistics.median(ratios), "ratio_spread": [ratios[0], ratios[-1]],
            "cpu_ratio": median(theirs, 1) / median(ours, 1),
            "ours_peak_mb": max(run[2] for run in ours), "mergekit_peak_mb": max(run[2] for run in theirs),
        }  # fmt: skip
        print(method, found[method], flush=True)
        put("merge_speed", {"methods": found, "max_memory": "1GB", "load": os.getloadavg()})


def kills(count: int = 20) -> None:
    """kill -9 at a random moment of a real merge, then run again: the same bytes, never a part under the final name.

    Three models of 135M parameters by dare_ties. The moment is drawn evenly over what an undisturbed run takes from its
    first file on to its end.
    """
    file, out, partial = big_file("dare_ties"), WORK / "kills", WORK / "kills.partial"
    command, noted = [*OURS, str(file), str(out), "--max-memory", "1GB"], WORK / "kills-135m.json"

    def digest() -> str:
        parts = [hashlib.sha256(f.read_bytes()).hexdigest() + f.name for f in sorted(out.iterdir())]
        return hashlib.sha256("".join(parts).encode()).hexdigest()

    def fresh() -> None:
        for path in (out, partial):
            shutil.rmtree(path, ignore_errors=True)

    def begin() -> subprocess.Popen[bytes]:
        """A run whose first file is there."""
        fresh()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        while process.poll() is None and not partial.exists():
            time.sleep(0.001)
        return process

    calm, lengths = "", []
    for _ in range(2):
        process, began = begin(), time.perf_counter()
        if process.wait():
            raise SystemExit("the undisturbed run failed")
        lengths.append(time.perf_counter() - began)
        if calm not in ("", digest()):
            raise SystemExit("two undisturbed runs differ")
        calm = digest()
    rows = json.loads(noted.read_text()) if noted.exists() else []
    while len(rows) < count:  # resumable: each kill is noted
        moment = random.Random(len(rows)).uniform(0, min(lengths))
        process = begin()
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        process.wait()
        while_writing = partial.exists()
        journal = partial / "journal.jsonl"
        finished = len(journal.read_text().splitlines()) - 1 if journal.exists() else None
        if out.exists() and digest() != calm:
            raise SystemExit("a part of a model stands under the final name")
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows.append(
            {"moment_s": round(moment, 3), "while_writing": while_writing, "tensors_finished": finished,
             "same_bytes": digest() == calm}
        )  # fmt: skip
        print(rows[-1], flush=True)
        noted.write_text(json.dumps(rows))
    cut = [] if shutil.which("unshare") is None else ["unshare", "-rn"]
    fresh()
    offline = subprocess.run([*cut, *command], stdout=subprocess.DEVNULL).returncode == 0 and digest() == calm
    fresh()
    summary = {
        "kills": len(rows), "while_writing": sum(r["while_writing"] for r in rows),
        "same_bytes": sum(r["same_bytes"] for r in rows), "undisturbed_s_after_start": [round(t, 2) for t in lengths],
        "same_bytes_without_network": offline if cut else "unshare is missing",
    }  # fmt: skip
    print(summary)
    put("merge_kills", {"model": "three of 135M, dare_ties, 1GB", **summary, "rows": rows})
