"""Merging beside mergekit 0.1.5: random files and tensors, wall time and peak memory; kills, no network.

mergekit (LGPL) runs beside us in its own environment: python -m venv .bench/mergekit, then pip install mergekit==0.1.5
there. Usage: python benchmarks/merge.py files|tensors|goldens|speed|kills [N].
Writes benchmarks/results/merge_*.json. Work files lie in the cache, outside of the repository.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_random import METHODS, RANDOM, ROOT, random_case, random_file, tiny_models
from safetensors.torch import load_file, save_file

from gnomon.errors import GnomonError
from gnomon.models.cache import cache_dir
from gnomon.models.reference import open_checkpoint

PEER = ROOT / ".bench" / "mergekit" / "bin"
WORK = cache_dir() / "bench" / "merge"
RESULTS = ROOT / "benchmarks" / "results"
OURS = [sys.executable, "-m", "gnomon", "merge", "run"]
PEER_SCRIPT = """
import json, sys, warnings, logging
warnings.filterwarnings("ignore"); logging.disable(logging.CRITICAL)
import yaml, torch
from mergekit.config import MergeConfiguration
from mergekit.merge import run_merge
from mergekit.options import MergeOptions
for file, out, seed in json.load(open(sys.argv[1])):
    try:
        config = MergeConfiguration.model_validate(yaml.safe_load(open(file)))
        options = MergeOptions(write_model_card=False, random_seed=seed, quiet=True, num_threads=1)
        run_merge(config, out, options)
        open(out + ".done", "w").close()
    except BaseException as error:
        open(out + ".error", "w").write(f"{type(error).__name__}: {error}")
"""


def ulps(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Units in the last place between two half-type tensors."""

    def line(x: torch.Tensor) -> torch.Tensor:
        i = x.contiguous().view(torch.int16).int()
        return torch.where(i < 0, -(i & 0x7FFF), i)

    return (line(a) - line(b)).abs()


def compare(ours: Path, theirs: Path) -> dict[str, Any]:
    """Worst differences over all tensors."""
    a = load_file(ours / "model.safetensors")
    b = {name: tensor for file in sorted(theirs.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    if a.keys() != b.keys():
        return {"same": False, "why": f"names differ: {sorted(a.keys() ^ b.keys())[:4]}"}
    worst, over_one, most, elements = 0.0, 0, 0, 0
    for name, tensor in a.items():
        if tensor.dtype != b[name].dtype or tensor.shape != b[name].shape:
            return {"same": False, "why": f"{name}: {tensor.dtype} {tensor.shape}, {b[name].dtype} {b[name].shape}"}
        elements += tensor.numel()
        if tensor.dtype is torch.float32:
            scale = float(b[name].abs().max()) or 1.0
            worst = max(worst, float((tensor - b[name]).abs().max()) / scale)
        else:
            off = ulps(tensor, b[name])
            over_one, most = over_one + int((off > 1).sum()), max(most, int(off.max()))
    share = over_one / elements
    good = worst <= 2e-6 and share <= 0.001
    return {"same": good, "relative": worst, "share_over_1_ulp": share, "most_ulps": most}


def files(count: int = 200) -> None:
    """Random merge files in fp32, bf16 and fp16, ours against mergekit's."""
    rows: list[dict[str, Any]] = []
    jobs, folder = [], WORK / "random"
    for seed in range(count):
        dtype = (torch.float32, torch.bfloat16, torch.float16)[seed // len(METHODS) % 3]
        models = tiny_models(WORK / str(dtype).removeprefix("torch."), dtype)
        content = random_file(seed, models, dtype)
        file = folder / f"{seed}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(content, sort_keys=False))
        jobs.append((str(file), str(folder / f"theirs{seed}"), seed))
        rows.append({"seed": seed, "method": content["merge_method"], "dtype": str(dtype)})
    todo = [job for job in jobs if not any(Path(job[1] + end).exists() for end in (".done", ".error"))]
    (folder / "jobs.json").write_text(json.dumps(todo))
    subprocess.run(
        ["env", "-u", "PYTHONPATH", PEER / "python", "-c", PEER_SCRIPT, str(folder / "jobs.json")], check=True
    )
    from gnomon.merge.build import MergeRun, open_merge
    from gnomon.merge.writer import write

    for row, (file_name, theirs, seed) in zip(rows, jobs, strict=True):
        error = Path(theirs + ".error")
        if error.exists():
            row["peer_error"] = error.read_text()[:200]
            continue
        # --compat takes mergekit's steps and its random numbers; without it, what draws none is compared too
        for word, compat in (("compat", True), ("native", False)):
            if not compat and row["method"] in RANDOM:
                continue
            ours = folder / f"{word}{seed}"
            shutil.rmtree(ours, ignore_errors=True)
            try:
                write(open_merge(file_name, MergeRun(seed=seed, compat=compat)), ours)
                row[word] = compare(ours, Path(theirs))
            except GnomonError as refused:
                row[word] = {"same": False, "why": f"refused: {refused}"}
            shutil.rmtree(ours, ignore_errors=True)
    ran = [row for row in rows if "peer_error" not in row]

    def equal(word: str, dtype: str) -> str:
        chosen = [row[word]["same"] for row in ran if word in row and row["dtype"] == f"torch.{dtype}"]
        return f"{sum(chosen)} of {len(chosen)}"

    summary = {
        "files": count, "peer_refused": len(rows) - len(ran),
        "equal": sum(row["compat"]["same"] for row in ran), "of": len(ran),
        **{f"{d} {w}": equal(w, d) for d in ("float32", "bfloat16", "float16") for w in ("compat", "native")},
        "different": [row for row in ran if not row["compat"]["same"]],
    }  # fmt: skip
    put("merge_files", {"summary": summary, "rows": rows})
    print(json.dumps(summary, indent=1)[:6000])


PEER_TENSORS = """
import sys, warnings; warnings.filterwarnings("ignore")
import torch
from mergekit.merge_methods.api import merge_tensors
found = {}
for key, (method, tensors, base, parameters, seed) in torch.load(sys.argv[1]).items():
    torch.manual_seed(seed)
    inputs = tensors if base is None else [base, *tensors]
    first = 0 if base is None else 1
    given = {k: dict(enumerate(v, first)) if isinstance(v, list) else v for k, v in parameters.items()}
    try:
        index = None if base is None else 0
        found[key] = merge_tensors(inputs, method, parameters=given, base_index=index, ids=list(range(len(inputs))))
    except Exception as error:
        found[key] = f"{type(error).__name__}: {error}"
torch.save(found, sys.argv[2])
"""


def tensors(count: int = 25) -> None:
    """Random tensors and parameters of every method, ours against mergekit's in-memory merge_tensors."""
    from gnomon.merge import method as ours

    WORK.mkdir(parents=True, exist_ok=True)
    kinds = {
        "fp32": (torch.float32, 0.3), "bf16": (torch.bfloat16, 0.3), "bf16 near": (torch.bfloat16, 0.005),
        "fp16": (torch.float16, 0.3), "fp16 near": (torch.float16, 0.005),
    }  # fmt: skip
    cases = {
        (name, kind, seed): random_case(name, seed, *facts)
        for name in METHODS for kind, facts in kinds.items() for seed in range(count)
    }  # fmt: skip
    torch.save(cases, WORK / "cases.pt")
    files_ = [str(WORK / "cases.pt"), str(WORK / "found.pt")]
    subprocess.run(["env", "-u", "PYTHONPATH", PEER / "python", "-c", PEER_TENSORS, *files_], check=True)
    theirs = torch.load(WORK / "found.pt")
    table: dict[str, dict[str, Any]] = {}
    for key, (name, given, base, parameters, seed) in cases.items():
        row = table.setdefault(f"{name} {key[1]}", {"cases": 0, "peer_refused": 0, "compat": 0, "native": 0})
        row["cases"] += 1
        if isinstance(theirs[key], str):
            row["peer_refused"] += 1
            continue
        for word in ("compat", "native"):
            merged = ours(name)(given, base=base, seed=seed, compat=word == "compat", **parameters)
            row[word] += near(merged, theirs[key].to(merged.dtype))
    ran = {key: row["cases"] - row["peer_refused"] for key, row in table.items()}
    summary = {
        f"{kind} {word}": f"{sum(r[word] for k, r in chosen)} of {sum(ran[k] for k, _ in chosen)}"
        for kind in kinds for word in ("compat", "native")
        for chosen in [[(k, r) for k, r in table.items() if k.split(" ", 1)[1] == kind]]
    }  # fmt: skip
    print(json.dumps(summary, indent=1))
    put(
        "merge_tensors",
        {"bar": "fp32 2e-6 of the largest; bf16, fp16 one ulp on 99.9 %", "summary": summary, "rows": table},
    )


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The bar of `files`, for one tensor."""
    if ours.dtype is torch.float32:
        return float((ours - theirs).abs().max()) <= 2e-6 * (float(theirs.abs().max()) or 1.0)
    return float((ulps(ours, theirs) > 1).float().mean()) <= 0.001


def goldens(count: int = 2) -> None:
    """Record mergekit's answers on small tensors for the tests: tests/merge/mergekit_0_1_5.json."""
    small: dict[Any, Any] = {}
    for kind, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        for name, seed in [(name, seed) for name in METHODS for seed in range(40)]:
            case = random_case(name, seed, dtype, 0.3)
            if case[1][0].numel() in (7, 24) and sum(k[:2] == (name, kind) for k in small) < count:
                small[name, kind, seed] = case
    torch.save(small, WORK / "cases.pt")
    files_ = [str(WORK / "cases.pt"), str(WORK / "found.pt")]
    subprocess.run(["env", "-u", "PYTHONPATH", PEER / "python", "-c", PEER_TENSORS, *files_], check=True)
    rows = []
    for key, answer in torch.load(WORK / "found.pt").items():
        name, given, base, parameters, seed = small[key]
        if isinstance(answer, torch.Tensor):
            plain = {"shape": list(answer.shape), "tensors": [flat(t) for t in given], "base": flat(base)}
            facts = {"method": name, "seed": seed, "dtype": key[1], "parameters": parameters}
            rows.append({**facts, **plain, "merged": flat(answer)})
    about = {"source": "mergekit 0.1.5 merge_tensors, CPU", "torch": version("torch")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    text = f'{{"about": {json.dumps(about)}, "rows": [\n{lines}\n]}}\n'
    (ROOT / "tests" / "merge" / "mergekit_0_1_5.json").write_text(text)


def flat(tensor: torch.Tensor | None) -> list[float] | None:
    return None if tensor is None else [float(f"{x:.9g}") for x in tensor.reshape(-1).tolist()]


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
            "ours_s": median(ours, 0), "mergekit_s": median(theirs, 0), "ratio": statistics.median(ratios),
            "ratio_spread": [ratios[0], ratios[-1]], "cpu_ratio": median(theirs, 1) / median(ours, 1),
            "ours_peak_mb": max(run[2] for run in ours), "mergekit_peak_mb": max(run[2] for run in theirs),
        }  # fmt: skip
        print(method, found[method], flush=True)
        put("merge_speed", {"methods": found, "max_memory": "1GB", "rounds": rounds, "load": os.getloadavg()})


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


def put(name: str, content: dict[str, Any]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "peer": "mergekit 0.1.5", "torch": version("torch"), "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(), "commit": commit.stdout.strip(),
    }  # fmt: skip
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({"about": about} | content, indent=1) + "\n")


if __name__ == "__main__":
    word, *rest = sys.argv[1:] or ["files"]
    work: Any = {"files": files, "tensors": tensors, "goldens": goldens, "speed": speed, "kills": kills}[word]
    if word == "speed" and rest:
        speed(int(rest[0]), tuple(rest[1:]) or ("ties", "dare_ties", "linear", "slerp", "model_stock"))
    else:
        work(*(int(x) for x in rest))
