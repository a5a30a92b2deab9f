"""The ensemble beside its members. Writes benchmarks/results/ensemble*.json.

    python benchmarks/ensemble.py quality   bits per byte and multiple choice, members and mixture (GNOMON_DATA)
    python benchmarks/ensemble.py speed     ms per token of union, topk, gate, byte against the sum of the members alone

Quality is resumable: what a member thinks of each byte is kept in .bench/ensemble. Timings alternate in one process;
medians of several rounds, with quartiles.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.ensemble import Ensemble
from gnomon.ensemble.compare import Contender, Item, _add_differences, _interval, _judge, svg
from gnomon.ensemble.scoring import bits, mixed, tuned_weights
from gnomon.loading import load

UNTIL = time.perf_counter() + float(os.environ.get("LIMIT", "inf"))
ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data")) / "merge-ensemble"
KEPT = ROOT / ".bench" / "ensemble"
RESULTS = ROOT / "benchmarks" / "results"
MEMBERS = ["smollm2-135m-instruct", "gemma-3-270m"]
ITEMS = int(os.environ.get("ITEMS", "200"))
TEXTS = int(os.environ.get("TEXTS", "6"))
LANGUAGES = ROOT / "benchmarks" / "texts" / "languages.json"
"""Our own texts in five languages."""


def lines(name: str, count: int, skip: int = 0) -> list[dict[str, Any]]:
    with (DATA / name).open(encoding="utf-8") as file:
        return [json.loads(line) for line in file][skip : skip + count]


def texts(split: str) -> dict[str, list[str]]:
    """Kinds of text. tune: other texts than test."""
    skip = 0 if split == "test" else 40
    found = {
        "science": [e["question"] for e in lines("arc_challenge_test.jsonl", TEXTS, skip)],
        "maths": [e["question"] for e in lines("gsm8k_test.jsonl", TEXTS, skip)],
        "code": [(e.get("code") or e.get("text") or str(e))[:300] for e in lines("mbpp_test.jsonl", TEXTS, skip)],
    }
    return found | json.loads(LANGUAGES.read_text(encoding="utf-8"))[split]


def questions() -> list[Item]:
    name = "arc_challenge_test.jsonl"
    usual = [entry for entry in lines(name, 2 * ITEMS) if entry["answer"] in "ABCDE"]  # a few are numbered instead
    return [Item.parse(entry, name) for entry in usual[:ITEMS]]


class Scorer:
    """Byte probabilities of one member, kept on disk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = KEPT / f"{name}.json"
        self.known: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.single: Ensemble | None = None
        self.fresh = 0

    def __call__(self, text: str, prompt: str = "") -> np.ndarray:
        key = hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()[:24]
        if key not in self.known:
            started = time.perf_counter()
            if self.single is None:
                self.single = Ensemble([self.name], core="byte", threads=1, ledger=False)
            (values,) = self.single.byte_probabilities(text, prompt).values()
            self.known[key] = values[:-1]
            self.fresh += 1
            print(self.name, len(text), round(time.perf_counter() - started, 1), file=sys.stderr, flush=True)
            if self.fresh % 20 == 0 or time.perf_counter() > UNTIL:
                self.keep()
            if time.perf_counter() > UNTIL:
                sys.exit("Time is up; what is scored is kept.")
        return np.array(self.known[key])

    def keep(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.known))
        partial.replace(self.path)

    def close(self) -> None:
        self.keep()
        if self.single is not None:
            self.single.close()
        self.single = None
        gc.collect()


def quality() -> None:
    """Members, the equal mixture, and the mixture whose weight was tuned on other texts."""
    of: dict[str, Any] = {}
    for name in MEMBERS:
        scorer = Scorer(name)
        of[name] = {
            "tune": [scorer(t) for group in texts("tune").values() for t in group],
            "test": {kind: [scorer(t) for t in group] for kind, group in texts("test").items()},
            "items": [[scorer(c, item.prompt) for c in item.choices] for item in questions()],
        }
        scorer.close()
    a, b = (np.concatenate(of[name]["tune"]) for name in MEMBERS)
    weight = tuned_weights([a, b])[0]
    items = questions()
    flat = {name: [p for group in of[name]["test"].values() for p in group] for name in MEMBERS}
    contenders = [
        Contender(MEMBERS[0], [], [1.0]),
        Contender(MEMBERS[1], [], [1.0]),
        Contender("mixture, equal weights", [], [0.5, 0.5]),
        Contender(f"mixture, tuned weight {weight:.3f}", [], [weight, 1 - weight]),
    ]
    for place, contender in enumerate(contenders):
        names = [MEMBERS[place]] if place < 2 else MEMBERS
        _judge(contender, [(flat[name], of[name]["items"]) for name in names], items)
    lengths = np.array([len(p) for p in flat[MEMBERS[0]]])
    rows = [
        {
            "name": c.name,
            "bits_per_byte": _interval(np.array(c.bits), lengths, 0),
            **({"accuracy": _interval(np.array(c.right, dtype=float), np.ones(len(items)), 0)} if items else {}),
        }
        for c in contenders
    ]
    report: dict[str, Any] = {"texts": len(lengths), "bytes": int(lengths.sum()), "items": len(items), "rows": rows}
    _add_differences(report, contenders, lengths, len(items), 0)
    kinds: dict[str, Any] = {}
    for kind in of[MEMBERS[0]]["test"]:
        first, second = (np.concatenate(of[name]["test"][kind]) for name in MEMBERS)
        kinds[kind] = {
            MEMBERS[0]: bits(first),
            MEMBERS[1]: bits(second),
            "equal": bits(mixed([first, second], [0.5, 0.5])),
            "tuned": bits(mixed([first, second], [weight, 1 - weight])),
        }
    report |= {"kinds": kinds, "tuned_weight_of_the_first": weight, "measure": "byte core, canonical covers"}
    report["jensen_holds"] = all(
        bits(mixed([x, y], [w, 1 - w])) <= w * bits(x) + (1 - w) * bits(y) + 1e-9
        for x, y in zip(*flat.values(), strict=True)
        for w in (0.25, 0.5, weight)
    )
    report |= {"threads": os.environ.get("GNOMON_THREADS")}
    write("ensemble-quality", report)
    (RESULTS / "ensemble-quality.svg").write_text(svg(report))


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


def decoding(model: Any, count: int, **options: Any) -> float:
    """ms per symbol, the prompt's own time left out."""
    prompt = "The keeper of the lighthouse climbed"
    model.generate(prompt, max_tokens=1, seed=1, **options)  # the prompt is cached now, where it can be
    started, first, tokens = time.perf_counter(), None, 0
    for chunk in model.stream(prompt, max_tokens=count, ignore_eos=True, seed=1, **options):
        if chunk.token_ids and first is None:
            first = time.perf_counter()
        tokens += len(chunk.token_ids)
    return 1000 * (time.perf_counter() - (first or started)) / max(tokens - 1, 1)


def speed() -> None:
    rounds, count = int(os.environ.get("ROUNDS", "5")), int(os.environ.get("COUNT", "24"))
    wanted = os.environ.get("CORES", "union,topk,gate 0.5,byte").split(",")
    members = [load(name, speculation="off", ledger=False) for name in MEMBERS]
    kinds: dict[str, dict[str, Any]] = {
        "union": {"core": "union"},
        "topk": {"core": "topk"},
        "gate 0.5": {"core": "union", "when": "gate", "threshold": 0.5},
        "byte": {"core": "byte"},
    }
    made = {name: Ensemble(members, ledger=False, **kinds[name]) for name in wanted}
    times: dict[str, list[float]] = {name: [] for name in [*MEMBERS, *made]}
    share = {}
    for _ in range(rounds):
        for name, member in zip(MEMBERS, members, strict=True):
            times[name].append(decoding(member, count))
        for name, ensemble in made.items():
            times[name].append(decoding(ensemble, count * (4 if name == "byte" else 1)))
    for name, ensemble in made.items():
        used = ensemble.generate("The keeper of the lighthouse climbed", max_tokens=count, ignore_eos=True, seed=1)
        share[name] = used.usage.details["ensemble"]
    together = [a + b for a, b in zip(times[MEMBERS[0]], times[MEMBERS[1]], strict=True)]
    ratios = {n: spread([t / s for t, s in zip(times[n], together, strict=True)]) for n in made}
    report = {
        "unit": "ms per symbol (byte: ms per byte)",
        "rounds": rounds,
        "ms": {name: spread(values) for name, values in times.items()},
        "sum_of_members_alone": spread(together),
        "ratio_to_sum_of_members": ratios,
        "usage": share,
    }
    write("ensemble-speed", report)


def write(name: str, report: dict[str, Any]) -> None:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT).stdout
    head = {
        "machine": platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "load": os.getloadavg(),
        "commit": commit.strip(),
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(head | report, indent=1) + "\n")
    print(json.dumps(head | report, indent=1))


if __name__ == "__main__":
    {"quality": quality, "speed": speed}[sys.argv[1]]()
