"""The ensemble beside its members. Writes benchmarks/results/ensemble*.json.

    python benchmarks/ensemble.py quality   bits per byte and multiple choice, members and mixture (GNOMON_DATA)
    python benchmarks/ensemble.py gate      accuracy and share of fused tokens at each threshold, and of `safe`'s rule
    python benchmarks/ensemble.py ranker    a pair ranker over MiniLM, fitted and tried on ARC
    python benchmarks/ensemble.py speed     ms per token of union, topk, gate, safe, byte against the members' sum alone

Quality and gate are resumable (LIMIT=SECONDS stops a run): what is found is kept in .bench/ensemble. Timings alternate
in one process; medians of several rounds, with quartiles.
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
PROFILES = {"gemma-3-270m": "gguf"}
"""For quality: its large vocabulary takes too long in fp32 on two cores."""
ITEMS = int(os.environ.get("QUESTIONS", "50"))
TEXTS = int(os.environ.get("TEXTS", "3"))
"""Of each kind; for tuning a third of it of each language."""
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
    count = TEXTS if split == "test" else max(1, TEXTS // 3)
    return found | {k: v[:count] for k, v in json.loads(LANGUAGES.read_text(encoding="utf-8"))[split].items()}


def questions() -> list[Item]:
    name = "arc_challenge_test.jsonl"
    usual = [entry for entry in lines(name, 2 * ITEMS) if entry["answer"] in "ABCDE"]  # a few are numbered instead
    return [Item.parse(entry, name) for entry in usual[:ITEMS]]


class Scorer:
    """Byte probabilities of one member, kept on disk."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.profile = PROFILES.get(name, "fp32")
        self.path = KEPT / (f"{name}.json" if self.profile == "fp32" else f"{name}-{self.profile}.json")
        self.known: dict[str, list[float]] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.single: Ensemble | None = None
        self.fresh = 0

    def knows(self, text: str, prompt: str = "") -> bool:
        return hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()[:24] in self.known

    def __call__(self, text: str, prompt: str = "") -> np.ndarray:
        key = hashlib.sha256(f"{prompt}\0{text}".encode()).hexdigest()[:24]
        if key not in self.known:
            started = time.perf_counter()
            if self.single is None:
                self.single = Ensemble([self.name], core="byte", profile=self.profile, threads=1, ledger=False)
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
            "items": [],
        }
        for item in questions():
            if time.perf_counter() < UNTIL - 12 or all(scorer.knows(c, item.prompt) for c in item.choices):
                of[name]["items"].append([scorer(c, item.prompt) for c in item.choices])
        scorer.close()
    a, b = (np.concatenate(of[name]["tune"]) for name in MEMBERS)
    weight = tuned_weights([a, b])[0]
    items = questions()[: min(len(of[name]["items"]) for name in MEMBERS)]
    for name in MEMBERS:
        of[name]["items"] = of[name]["items"][: len(items)]
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
    report |= {"profiles": {name: PROFILES.get(name, "fp32") for name in MEMBERS}}
    write("ensemble-quality", report)
    (RESULTS / "ensemble-quality.svg").write_text(svg(report))


def gate() -> None:
    """Multiple choice through the union core: every token fused, the primary alone, and gates between."""
    path, items = KEPT / "gate.json", questions()
    kept: dict[str, list[list[list[float]]]] = json.loads(path.read_text()) if path.exists() else {}
    with Ensemble(MEMBERS, core="union", primary=0, profile="fp32", threads=1, ledger=False) as ensemble:
        for item in items:
            if item.prompt in kept or time.perf_counter() > UNTIL:
                continue
            seen = ensemble.judge(item.prompt, item.choices)
            kept[item.prompt] = [[[j.best, j.alone, j.fused] for j in choice] for choice in seen]
            print(len(kept), file=sys.stderr, flush=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(kept))
    items = [item for item in items if item.prompt in kept]
    sizes = np.ones(len(items))

    def judged(threshold: float) -> tuple[np.ndarray, float]:
        """Which items are answered rightly, and the share of fused tokens."""
        right, opened, count = [], 0, 0
        for item in items:
            scores = []
            for choice, seen in zip(item.choices, kept[item.prompt], strict=True):
                scores.append(sum(f if b < threshold else a for b, a, f in seen) / len(choice.encode()))
                opened, count = opened + sum(b < threshold for b, _, _ in seen), count + len(seen)
            right.append(int(np.argmax(scores)) == item.answer)
        return np.array(right, dtype=float), opened / count

    every, _ = judged(2.0)
    rows = []
    for threshold in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9, 2.0):
        right, share = judged(threshold)
        rows.append(
            {
                "threshold": threshold,
                "fused_share": round(share, 4),
                "accuracy": _interval(right, sizes, 0),
                "to_every": _interval(right - every, sizes, 0),
            }
        )
    write("ensemble-gate", {"primary": MEMBERS[0], "items": len(items), "rows": rows})


def ranker() -> None:
    """Right against wrong choices of the training items; then the best of each test item's choices."""
    from gnomon.ensemble.ranker import PairRanker, Preference

    def items(name: str, count: int) -> list[Item]:
        usual = [entry for entry in lines(name, 2 * count) if entry["answer"] in "ABCDE"]
        return [Item.parse(entry, name) for entry in usual[:count]]

    learned, asked = items("arc_challenge_train.jsonl", 800), items("arc_challenge_test.jsonl", 400)
    with load("minilm-l6-v2") as model:
        pairs = [
            Preference(item.prompt, item.choices[item.answer], choice)
            for item in learned
            for place, choice in enumerate(item.choices)
            if place != item.answer
        ]
        made = PairRanker.fit(model, pairs, penalty=3.0)
        right, pairwise = [], []
        for item in asked:
            scores = made.scores(item.prompt, item.choices)
            right.append(float(int(np.argmax(scores)) == item.answer))
            pairwise += [float(scores[item.answer] > s) for p, s in enumerate(scores) if p != item.answer]
    chance = float(np.mean([1 / len(item.choices) for item in asked]))
    report = {
        "embedding": "minilm-l6-v2",
        "pairs_learned": len(pairs),
        "items": len(asked),
        "accuracy": _interval(np.array(right), np.ones(len(right)), 0),
        "chance": chance,
        "pairs_right": float(np.mean(pairwise)),
    }
    write("ensemble-ranker", report)


def spread(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "q1": low, "q3": high}


PROMPTS = ("The keeper of the lighthouse climbed", "In the beginning of the nineteenth century", "def fibonacci(n):")


def decoding(model: Any, count: int, prompt: str) -> tuple[float, dict[str, Any]]:
    """ms per symbol, the prompt's own time left out; and the usage."""
    model.generate(prompt, max_tokens=1, seed=1)  # the prompt is cached now, where it can be
    started, first, tokens, usage = time.perf_counter(), None, 0, None
    for chunk in model.stream(prompt, max_tokens=count, ignore_eos=True, seed=1):
        if chunk.token_ids and first is None:
            first = time.perf_counter()
        tokens += len(chunk.token_ids)
        usage = chunk.usage or usage
    spent = 1000 * (time.perf_counter() - (first or started)) / max(tokens - 1, 1)
    return spent, (usage.details or {}).get("ensemble", {}) if usage else {}


def speed() -> None:
    """Members and ensembles alternate; each round takes the next prompt."""
    rounds, count = int(os.environ.get("ROUNDS", "9")), int(os.environ.get("COUNT", "17"))
    members = [load(name, profile="fp32", speculation="off", ledger=False) for name in MEMBERS]
    kinds: dict[str, dict[str, Any]] = {
        "union": {"core": "union"},
        "topk": {"core": "topk"},
        "gate 0.2": {"core": "union", "when": "gate", "threshold": 0.2},
        "gate 0.3": {"core": "union", "when": "gate", "threshold": 0.3},
        "gate 0.5": {"core": "union", "when": "gate", "threshold": 0.5},
        "safe": {"core": "union", "when": "safe"},
        "byte": {"core": "byte"},
    }
    made = {name: Ensemble(members, ledger=False, **options) for name, options in kinds.items()}
    times: dict[str, list[float]] = {name: [] for name in [*MEMBERS, *made]}
    shares: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds + 1):
        prompt = PROMPTS[number % len(PROMPTS)]
        for name, model in [*zip(MEMBERS, members, strict=True), *made.items()]:
            spent, used = decoding(model, count * (2 if name == "byte" else 1), prompt)
            if number:  # the first round warms up
                times[name].append(spent)
                if used:
                    shares[name].append(used["fused_steps"] / used["steps"])
    together = [a + b for a, b in zip(times[MEMBERS[0]], times[MEMBERS[1]], strict=True)]
    text = "The keeper of the lighthouse climbed the stairs every evening to light the lamp."
    tokens = [len(model.encode(text)) for model in members]
    per_token = len(text.encode()) / (sum(tokens) / len(tokens))
    write(
        "ensemble-speed",
        {
            "unit": "ms per symbol (byte: ms per byte)",
            "rounds": rounds,
            "symbols": count,
            "ms": {name: spread(values) for name, values in times.items()},
            "least_ms": {name: min(values) for name, values in times.items()},
            "ratio_of_least": {n: min(times[n]) / sum(min(times[m]) for m in MEMBERS) for n in made},
            "sum_of_members_alone": spread(together),
            "ratio_to_sum_of_members": {
                n: spread([t / s for t, s in zip(times[n], together, strict=True)]) for n in made
            },
            "fused_share": {name: statistics.mean(values) for name, values in shares.items()},
            "byte_ms_per_token": statistics.median(times["byte"]) * per_token,
            "bytes_per_token": per_token,
        },
    )


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
    {"quality": quality, "gate": gate, "ranker": ranker, "speed": speed}[sys.argv[1]]()
