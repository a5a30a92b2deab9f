"""mergekit 0.1.5's own answers, recorded by `python benchmarks/merge.py goldens` (source and version in the file)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.merge import method

ROWS = json.loads((Path(__file__).parent / "mergekit_0_1_5.json").read_text())["rows"]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}-{row['seed']}")
def test_the_peers_answer_is_met_to_two_millionths(row: dict[str, Any]) -> None:
    shape = row["shape"]
    tensors = [torch.tensor(values).reshape(shape) for values in row["tensors"]]
    base = torch.tensor(row["base"]).reshape(shape) if row["base"] else None
    merged = method(row["method"])(tensors, base=base, seed=row["seed"], compat=True, **row["parameters"])
    wanted = torch.tensor(row["merged"]).reshape(shape)
    assert float((merged - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())


def test_every_one_of_the_twenty_methods_is_recorded() -> None:
    assert len({row["method"] for row in ROWS}) == 20
