"""What merging does to real models: SmolLM2-135M-Instruct tuned briefly on three small tasks, then merged.

    python benchmarks/merge_effect.py train     three fine-tunes, kept in the cache (resumable)
    python benchmarks/merge_effect.py sweep     every merge's losses, kept in the cache (resumable)
    python benchmarks/merge_effect.py plot      them -> results/merge_effect.json and .svg

Tasks: grade-school mathematics (GSM8K), Python functions (MBPP), a bank's customer questions (BANKING77). Loss: mean
negative log-likelihood of the answers' tokens, in nats, on examples that no training saw; means over examples are
given with 95 % bootstrap intervals. Needs the extra `transformers`, and the tests' data (GNOMON_DATA).
"""

from __future__ import annotations

import csv
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from gnomon.merge.build import MergeRun, open_merge
from gnomon.merge.evolve import evolve
from gnomon.merge.perplexity import read_text
from gnomon.merge.writer import write
from gnomon.models.cache import cache_dir
from gnomon.models.reference import open_checkpoint

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / "../shared/data"))
WORK = cache_dir() / "bench" / "merge-effect"
POINTS = WORK / "points.json"
RESULT = ROOT / "benchmarks" / "results" / "merge_effect.json"
BASE = "smollm2-135m-instruct"
TASKS = ("math", "code", "intent")
STEPS = {"math": 32, "code": 32, "intent": 48}
BATCH, LONGEST, RATE, HELD_OUT = 8, 128, 5e-5, 32
Example = tuple[str, str]
"""What is given, and the answer whose tokens are counted."""


def examples(task: str) -> tuple[list[Example], list[Example]]:
    """(to train on, held out)."""
    if task == "math":
        rows = [json.loads(line) for line in (DATA / "merge-ensemble/gsm8k_train_first300.jsonl").open()]
        asked = [(f"Question: {row['question']}\nAnswer: ", row["answer"]) for row in rows]
        return asked[:240], asked[240:]
    if task == "code":
        rows = [json.loads(line) for line in (DATA / "merge-ensemble/mbpp_test.jsonl").open()]
        asked = [(f"{row['text']}\n```python\n", row["code"].replace("\r", "") + "\n```") for row in rows]
        return asked[:-100], asked[-100:]
    with (DATA / "rails-streaming-ux/banking77_train.csv").open() as file:
        table = list(csv.DictReader(file))
    random.Random(0).shuffle(table)
    asked = [(f"Customer: {row['text'].strip()}\nTopic: ", row["category"].replace("_", " ")) for row in table]
    return asked[:2000], asked[2000:2200]


def encoded(tokenizer: Any, example: Example) -> tuple[list[int], int]:
    """(token ids, how many of them are given), cut to LONGEST."""
    given = tokenizer.encode(example[0]).ids
    return (given + tokenizer.encode(example[1] + "<|im_end|>").ids)[:LONGEST], len(given)


def batch_loss(module: torch.nn.Module, batch: list[tuple[list[int], int]]) -> torch.Tensor:
    """Mean loss of each example's answer tokens, [B]."""
    width = max(len(ids) for ids, _ in batch)
    ids_BT = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in batch])
    seen_BT = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in batch])
    hidden_BTC = module.model(input_ids=ids_BT, attention_mask=seen_BT).last_hidden_state
    losses = []
    for row, (ids, given) in enumerate(batch):
        logits = module.lm_head(hidden_BTC[row, given - 1 : len(ids) - 1]).float()
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[given:])))
    return torch.stack(losses)


def base_folder() -> Path:
    """The zoo's model as a float32 directory."""
    out = WORK / "base"
    if not out.exists():
        content = {"merge_method": "passthrough", "models": [{"model": BASE}], "dtype": "float32"}
        write(open_merge(content, MergeRun()), out)
    return out


def open_module(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    module: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return module


def train(*tasks: str) -> None:
    """Every parameter but the table of tokens, AdamW, linear decay; matrix products in bfloat16."""
    base = base_folder()
    tokenizer = open_checkpoint(str(base)).tokenizer().backend
    for task in tasks or TASKS:
        out = WORK / task
        if (out / "model.safetensors").exists():
            continue
        torch.manual_seed(0)
        module = open_module(base).train()
        module.get_input_embeddings().requires_grad_(False)  # type: ignore[operator]
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, betas=(0.9, 0.95))
        rows = [pair for e in examples(task)[0] if (pair := encoded(tokenizer, e))[1] < len(pair[0])]
        order = [i for epoch in range(99) for i in random.Random(epoch).sample(range(len(rows)), len(rows))]
        steps = STEPS[task]
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = RATE * min(1.0, (step + 1) / 8) * (1 - step / steps)
            with torch.autocast("cpu", torch.bfloat16):
                loss = batch_loss(module, [rows[i] for i in order[step * BATCH : (step + 1) * BATCH]]).mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(task, step, f"{float(loss.detach()):.4f}", flush=True)
        _save(base, out, {name: p.detach() for name, p in module.named_parameters()})


def _save(base: Path, out: Path, changed: Mapping[str, torch.Tensor]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix in (".json", ".jinja") and file.name != "gnomon_merge.json":
            (out / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: changed.get(name, tensor).contiguous() for name, tensor in load_file(base / "model.safetensors").items()
    }
    save_file(tensors, out / "partial.safetensors", {"format": "pt"})
    (out / "partial.safetensors").rename(out / "model.safetensors")


def measure(tensors: Mapping[str, torch.Tensor], module: torch.nn.Module, tokenizer: Any) -> dict[str, list[float]]:
    """Each held-out example's loss, by task."""
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
        found: dict[str, list[float]] = {}
        for task in TASKS:
            rows = [pair for e in examples(task)[1] if (pair := encoded(tokenizer, e))[1] < len(pair[0])][:HELD_OUT]
            found[task] = [v for i in range(0, len(rows), 8) for v in batch_loss(module, rows[i : i + 8]).tolist()]
    return found


def merges() -> Iterator[tuple[str, float, dict[str, Any] | Callable[[], dict[str, Any]]]]:
    """(method, the swept value, merge file or how to find it)."""
    base, tuned = str(WORK / "base"), [str(WORK / task) for task in TASKS]

    def file(method: str, shared: dict[str, Any], own: dict[str, Any] | None = None, **keys: Any) -> dict[str, Any]:
        models: list[dict[str, Any]] = [{"model": model, "parameters": own or {}} for model in tuned]
        if keys.pop("data", False):
            models = [entry | {"data": str(WORK / f"{task}.txt")} for entry, task in zip(models, TASKS, strict=True)]
        return {"merge_method": method, "models": models, "parameters": shared, "dtype": "float32", **keys}

    yield "average", 1.0, file("linear", {}, {"weight": 1.0})
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        yield "task_arithmetic", value, file("task_arithmetic", {"lambda": value}, {"weight": 1.0}, base_model=base)
    for value in (0.4, 0.8, 1.2, 1.6, 2.0):
        yield (
            "ties, density 0.2",
            value,
            file("ties", {"lambda": value}, {"weight": 1.0, "density": 0.2}, base_model=base),
        )
    for value in (0.2, 0.4, 0.6, 0.8, 1.0):
        yield "dare_linear, density 0.5", value, file(
            "dare_linear", {"lambda": value, "rescale": "inverse_density"}, {"weight": 1.0, "density": 0.5},
            base_model=base,
        )  # fmt: skip
    for value in (0.1, 0.5, 0.9, 1.0):
        yield "regmean (alpha)", value, file("regmean", {"alpha": value}, {"weight": 1.0}, data=True, data_tokens=3000)
    yield "adamerging", 0.0, file("adamerging", {}, base_model=base, data=True, data_tokens=3000)
    start = file("task_arithmetic", {}, {"weight": 0.7}, base_model=base)
    yield "evolved, text", 0.0, lambda: evolved("text", start)
    yield "evolved, answers", 0.0, lambda: evolved("answers", start)
    yield "regmean_pp", 0.9, file("regmean_pp", {"alpha": 0.9}, {"weight": 1.0}, data=True, data_tokens=3000)


def evolved(by: str, start: dict[str, Any]) -> dict[str, Any]:
    """The best of forty merges, judged by the first halves of the training texts or by their answers alone."""
    path = WORK / f"evolved-{by}.json"
    if not path.exists():
        texts = {task: read_text(WORK / f"{task}.{'txt' if by == 'text' else 'jsonl'}") for task in TASKS}
        tokens = 600 if by == "text" else 1500
        found = evolve(start, texts, genes=["weight"], budget=40, most_tokens=tokens, threads=1, on_step=print)
        path.write_text(json.dumps(vars(found)))
    content: dict[str, Any] = json.loads(path.read_text())["content"]
    return content


def write_texts() -> None:
    """What RegMean and AdaMerging read, and what evolution is judged by: each task's training examples."""
    for task in TASKS:
        asked = examples(task)[0][:120]
        (WORK / f"{task}.txt").write_text("\n\n".join(a + b for a, b in asked), encoding="utf-8")
        rows = [json.dumps({"prompt": a, "completion": b + "<|im_end|>"}) for a, b in asked]
        (WORK / f"{task}.jsonl").write_text("\n".join(rows), encoding="utf-8")


def sweep(seconds: str = "1e9") -> None:
    """Goes on where it stopped; stops after that many seconds."""
    until = time.monotonic() + float(seconds)
    write_texts()
    base = base_folder()
    tokenizer = open_checkpoint(str(base)).tokenizer().backend
    module = open_module(base).eval()
    points: list[dict[str, Any]] = json.loads(POINTS.read_text())["points"] if POINTS.exists() else []
    known = {(point["method"], point["value"]) for point in points}
    singles = [("base", 0.0, "base"), *((f"tuned on {task}", 0.0, task) for task in TASKS)]

    def note(method: str, value: float, tensors: Mapping[str, torch.Tensor]) -> None:
        losses = measure(tensors, module, tokenizer)
        row = {task: summary(found) for task, found in losses.items()}
        mean = statistics.fmean(r["loss"] for r in row.values())
        points.append({"method": method, "value": value, "mean": mean, **row})
        print(method, value, {task: round(r["loss"], 4) for task, r in row.items()}, f"{mean:.4f}", flush=True)
        put(points)

    for method, value, folder in singles:
        if (method, value) not in known:
            note(method, value, load_file(WORK / folder / "model.safetensors"))
    for method, value, content in merges():
        if (method, value) not in known and time.monotonic() < until:
            merged = open_merge(content() if callable(content) else content, MergeRun(seed=0, threads=1))
            note(method, value, {name: merged[name] for name in merged})


def summary(losses: list[float]) -> dict[str, Any]:
    """Mean and a 95 % bootstrap interval over examples."""
    draw = random.Random(0)
    means = sorted(statistics.fmean(draw.choices(losses, k=len(losses))) for _ in range(1000))
    return {"loss": statistics.fmean(losses), "low": means[25], "high": means[974], "examples": len(losses)}


def put(points: list[dict[str, Any]]) -> None:
    about = {
        "model": BASE, "steps": STEPS, "batch": BATCH, "rate": RATE, "longest": LONGEST, "held_out": HELD_OUT,
        "torch": version("torch"), "transformers": version("transformers"),
    }  # fmt: skip
    POINTS.write_text(json.dumps({"about": about, "points": points}, indent=1) + "\n")


def plot() -> None:
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    RESULT.write_text(POINTS.read_text())
    points = json.loads(RESULT.read_text())["points"]
    figure, axes = pyplot.subplots(1, len(TASKS) + 1, figsize=(15, 3.6), layout="constrained")
    single = {point["method"]: point for point in points}
    swept = list(dict.fromkeys(p["method"] for p in points if sum(q["method"] == p["method"] for q in points) > 1))
    for axis, task in zip(axes, (*TASKS, "mean"), strict=True):

        def value(point: dict[str, Any], task: str = task) -> float:
            return float(point["mean"] if task == "mean" else point[task]["loss"])

        for method in swept:
            line = [p for p in points if p["method"] == method]
            axis.plot([p["value"] for p in line], [value(p) for p in line], marker=".", label=method)
        axis.axhline(value(single["base"]), color="grey", linewidth=0.8, linestyle=":", label="base")
        axis.axhline(value(single["average"]), color="black", linewidth=0.8, linestyle="-", label="average")
        if task != "mean":
            axis.axhline(
                value(single[f"tuned on {task}"]), color="green", linewidth=0.8, linestyle="--", label="tuned on it"
            )
        axis.set(title=task, xlabel="swept value", ylabel="loss of the answer, nats a token" if axis is axes[0] else "")
    axes[-1].legend(*axes[0].get_legend_handles_labels(), fontsize=7)
    figure.savefig(RESULT.with_suffix(".svg"))


if __name__ == "__main__":
    {"train": train, "sweep": sweep, "plot": plot}[sys.argv[1] if len(sys.argv) > 1 else "train"](*sys.argv[2:])
