"""Merging beside mergekit 0.1.5: random files and tensors, wall time and peak memory; kills, no network.

mergekit (LGPL) runs beside us in its own environment: python -m venv .bench/mergekit, then pip install mergekit==0.1.5
there. Usage: python benchmarks/merge.py files|tensors|goldens|speed|kills [N].
Writes benchmarks/results/merge_*.json. Work files lie in the cache, outside of the repository.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from merge_bench import PEER, ROOT, WORK, put
from merge_random import METHODS, RANDOM, random_case, random_file, tiny_models
from merge_real import kills, speed
from safetensors.torch import load_file

from gnomon.errors import GnomonError

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
    for kind, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.items():
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


if __name__ == "__main__":
    word, *rest = sys.argv[1:] or ["files"]
    work: Any = {"files": files, "tensors": tensors, "goldens": goldens, "speed": speed, "kills": kills}[word]
    if word == "speed" and rest:
        speed(int(rest[0]), tuple(rest[1:]) or ("ties", "dare_ties", "linear", "slerp", "model_stock"))
    else:
        work(*(int(x) for x in rest))
