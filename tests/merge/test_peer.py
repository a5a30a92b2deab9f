"""mergekit 0.1.5's own answers, recorded by `python benchmarks/merge.py goldens` (source and version in the file)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.merge import method

ROWS = json.loads((Path(__file__).parent / "mergekit_0_1_5.json").read_text())["rows"]


def answer(row: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """(ours, the peer's)."""
    dtype = getattr(torch, row["dtype"])
    tensors = [torch.tensor(values, dtype=dtype).reshape(row["shape"]) for values in row["tensors"]]
    base = torch.tensor(row["base"], dtype=dtype).reshape(row["shape"]) if row["base"] else None
    merged = method(row["method"])(tensors, base=base, seed=row["seed"], compat=True, **row["parameters"])
    return merged, torch.tensor(row["merged"], dtype=dtype).reshape(row["shape"])


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['method']}-{row['dtype']}-{row['seed']}")
def test_the_peers_answer_is_met_to_two_millionths_or_in_half_types_to_the_last_place(row: dict[str, Any]) -> None:
    merged, wanted = answer(row)
    assert merged.dtype is wanted.dtype
    if row["dtype"] == "float32":
        assert float((merged - wanted).abs().max()) <= 2e-6 * float(wanted.abs().max())
    else:
        step = torch.finfo(wanted.dtype).eps * wanted.abs().float()
        assert bool(((merged.float() - wanted.float()).abs() <= step).all())


def test_every_one_of_the_twenty_methods_is_recorded() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        assert len({row["method"] for row in ROWS if row["dtype"] == dtype}) == 20
