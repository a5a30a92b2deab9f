"""`compat` over whole files: the order of draws, a generator that may be asked out of order, and mergekit's types."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gnomon.merge.writer
from gnomon.merge.build import MergeRun, open_merge
from gnomon.merge.compat.order import drawing_order
from gnomon.merge.writer import write

from .conftest import fine_tune, ties_file

Family = dict[str, Path]
ROWS = json.loads((Path(__file__).parent / "mergekit_order.json").read_text())["rows"]


def sliced(family: Family, slices: Any) -> dict[str, Any]:
    parameters = {"weight": 0.5, "density": 0.5}
    pieces = [
        {"sources": [{"model": str(family[m]), "layer_range": run, "parameters": parameters} for m, run in piece]}
        for piece in slices
    ]
    return {"merge_method": "dare_ties", "base_model": str(family["base"]), "slices": pieces}


@pytest.mark.parametrize("row", ROWS, ids=["overlapping", "at different depths"])
def test_tensors_of_sliced_merges_are_drawn_in_mergekits_order(row: dict[str, Any], family: Family) -> None:
    merged = open_merge(sliced(family, row["slices"]), MergeRun(compat=True))
    order = [name.removesuffix(".weight").removeprefix("model.") for name in merged.order]
    assert order == row["order"] != sorted(order)


def test_without_slices_the_order_is_that_of_names(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "dare.yaml", family, merge_method="dare_ties")
    tensors = open_merge(file, MergeRun(compat=True)).plan.tensors
    assert drawing_order(tensors, "llama") == sorted(tensor.name for tensor in tensors)


def test_a_tensor_asked_for_out_of_order_has_the_same_draws(family: Family) -> None:
    content = sliced(family, ROWS[0]["slices"])
    in_order = open_merge(content, MergeRun(seed=7, compat=True))
    wanted = {name: in_order[name] for name in in_order.order}
    backwards = open_merge(content, MergeRun(seed=7, compat=True))
    assert all(torch.equal(backwards[name], wanted[name]) for name in reversed(backwards.order))
    other = open_merge(content, MergeRun(seed=8, compat=True))
    assert not torch.equal(other["lm_head.weight"], wanted["lm_head.weight"])


def test_a_run_that_goes_on_draws_what_an_undisturbed_one_draws(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "sliced.yaml"
    file.write_text(yaml.safe_dump(sliced(family, ROWS[1]["slices"])))

    def digest(folder: Path) -> str:
        return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()

    write(open_merge(file, MergeRun(seed=3, compat=True)), tmp_path / "calm")
    real, count = gnomon.merge.writer._write_tensor, 0

    def failing(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count > 9:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gnomon.merge.writer, "_write_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        write(open_merge(file, MergeRun(seed=3, compat=True)), tmp_path / "out")
    monkeypatch.undo()
    again = write(open_merge(file, MergeRun(seed=3, compat=True)), tmp_path / "out")
    assert again.resumed == 9 and digest(tmp_path / "out") == digest(tmp_path / "calm")


@pytest.mark.parametrize("method", ["arcee_fusion", "ramplus_tl"])
def test_methods_that_mergekit_widens_write_float32_under_compat_alone(
    method: str, family: Family, tmp_path: Path
) -> None:
    halves = [fine_tune(family["base"], tmp_path / name, k, dtype=torch.bfloat16) for k, name in enumerate("xy")]
    content = {"merge_method": method, "base_model": str(halves[0]), "models": [{"model": str(halves[1])}]}

    def dtype(**run: Any) -> str:
        return open_merge(content | run.pop("more", {}), MergeRun(**run)).info("model.norm.weight").dtype

    assert (dtype(compat=True), dtype()) == ("float32", "bfloat16")
    assert dtype(compat=True, more={"out_dtype": "bfloat16"}) == "bfloat16"
