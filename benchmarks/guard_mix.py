"""Labelled texts of several sources for the co-processor, as JSON lines: what a user makes its heads of.

python benchmarks/guard_mix.py > labelled.jsonl
gnomon guard train-coprocessor labelled.jsonl -o heads.safetensors --json > benchmarks/results/guard_coprocessor.json
"""

from __future__ import annotations

import json
import random
import sys

from guard_states import Labelled, table

MOST_CHARS = 300


def rows() -> list[dict[str, str]]:
    """450 texts: S-Labs' harmless ones and injections, bank questions, multilingual injections, optimised suffixes."""
    chance = random.Random(1)
    slabs, bank = table("slabs_train.csv"), table("banking77_train.csv", "text", "category")
    sources: list[tuple[list[Labelled], int, str]] = [
        ([row for row in slabs if row.label == "1"], 120, "injection"),
        ([row for row in slabs if row.label == "0"], 120, ""),
        (bank, 120, ""),
        (table("yanismiraoui_injections.sample.jsonl"), 60, "injection"),
        (table("jbb_gcg_prompts.sample.jsonl", "prompt", "none"), 30, "suffix"),
    ]
    found = [
        {"text": row.text[:MOST_CHARS], "risk": "unsafe" if category else "safe", "category": category}
        for many, count, category in sources
        for row in chance.sample(many, count)
    ]
    chance.shuffle(found)
    return found


if __name__ == "__main__":
    for row in rows():
        sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
