"""Final hidden states of the 135M model for every text that guard_heads.py needs, read once and kept in .bench/heads.

Tokens are those of the co-processor (a word at a time), so what is trained on them judges a stream as it is written.
A run goes on where the last one stopped.
    python benchmarks/guard_states.py
"""

from __future__ import annotations

import csv
import json
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gnomon.guard.coprocessor import tokens_of

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("GNOMON_DATA", ROOT / ".." / "shared" / "data")) / "rails-streaming-ux"
CACHE = ROOT / ".bench" / "heads"
MODEL = "smollm2-135m-instruct"
MOST_CHARS = 600


class Labelled(NamedTuple):
    """label: of injections "1" or "0", of intents a name. boundary: where the text becomes what its label says."""

    text: str
    label: str
    boundary: int = 0


class States(NamedTuple):
    """Of each text: hidden states [T, C] and where in it the word of each token ends."""

    hidden: list[np.ndarray]
    ends: list[list[int]]


def table(name: str, text: str = "text", label: str = "label") -> list[Labelled]:
    path = DATA / name
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(path.open(encoding="utf-8", newline="")))
    else:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    cut = [(str(row[text])[:MOST_CHARS], str(row.get(label, "1"))) for row in rows]
    return [Labelled(text, label) for text, label in cut if text.strip()]


def indirect() -> list[Labelled]:
    names = ("bipia_text_attack_train.json", "bipia_code_attack_train.json")
    found = [json.loads((DATA / name).read_text("utf-8")) for name in names]
    return [Labelled(text[:MOST_CHARS], "1") for many in found for texts in many.values() for text in texts]


def joined(rows: list[Labelled], count: int) -> list[Labelled]:
    """A safe text, and behind it an injection: where does somebody who reads along notice?"""
    safe, unsafe = ([row.text for row in rows if row.label == label] for label in "01")
    pairs = list(zip(safe, unsafe, strict=False))[:count]
    return [Labelled(f"{first}. {second}", "1", len(first) + 1) for first, second in pairs]


def sources() -> dict[str, list[Labelled]]:
    """Every source whole; injections: label "1". Those that heads are trained on end in `train`."""
    train, test = table("slabs_train.csv"), table("slabs_test.sample.jsonl")
    return {
        "slabs train": train,
        "slabs validation": table("slabs_validation.csv"),
        "slabs test": test,
        "slabs joined train": joined(train[1::4], 500),
        "slabs joined test": joined(test, 300),
        "multilingual": table("yanismiraoui_injections.sample.jsonl"),
        "indirect": indirect(),
        "gcg": table("jbb_gcg_prompts.sample.jsonl", "prompt", "none"),
        "bank": [Labelled(row.text, "0") for row in table("banking77_test.sample.jsonl")],
        "bank train": [Labelled(row.text, "0") for row in table("banking77_train.csv")[::20]],
    }


def few() -> dict[str, list[Labelled]]:
    """What the language model reads of it."""
    steps = {"slabs train": 4, "slabs validation": 3, "bank": 2}
    return {name: rows[:: steps.get(name, 1)] for name, rows in sources().items()}


def states(name: str, rows: list[Labelled]) -> States:
    """From the cache; what is not there is computed, saved every 64 texts."""
    CACHE.mkdir(parents=True, exist_ok=True)
    path = CACHE / f"states-{name.replace(' ', '-')}-{len(rows)}.npz"
    hidden: list[np.ndarray] = []
    ends: list[list[int]] = []
    if path.exists():
        saved = np.load(path)
        cuts = np.cumsum(saved["lengths"])[:-1]
        hidden = np.split(saved["hidden"], cuts)
        ends = [one.tolist() for one in np.split(saved["ends"], cuts)]
    begun, done = time.time(), len(hidden)
    while len(hidden) < len(rows):
        for row in rows[len(hidden) : len(hidden) + 64]:
            ids, places = tokens_of(row.text, _model().tokenizer)
            hidden.append(_model().worker.hidden(ids).float().numpy().astype(np.float16))
            ends.append(places)
        part = path.with_suffix(".part.npz")
        flat = [place for one in ends for place in one]
        np.savez(part, hidden=np.concatenate(hidden), ends=flat, lengths=[len(one) for one in ends])
        part.replace(path)
        if len(hidden) % 256 == 0:
            rate = (len(hidden) - done) / (time.time() - begun)
            print(name, len(hidden), "of", len(rows), f"{rate:.1f} texts a second", flush=True)
    return States(hidden, ends)


_open: list[Any] = []


def _model() -> Any:
    import gnomon

    if not _open:
        _open.append(gnomon.load(MODEL, profile="fp32", threads=1, ledger=False))
    return _open[0]


def main() -> None:
    for name, rows in few().items():
        found = states(name, rows)
        print(name, len(rows), "texts", sum(map(len, found.hidden)), "tokens", flush=True)


if __name__ == "__main__":
    main()
