"""A model without a profile is probed once; one that has a profile, or is told its layer, is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnomon.edit import Fact, edit, probing
from gnomon.edit.editor import Editor
from gnomon.edit.table import table
from gnomon.loading import load
from gnomon.models.cache import cache_dir

FACT = Fact("The house of Ada", "Ada", "the")
QUICK = {"moments": "identity", "steps": 2, "report": False, "contrast": 0}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """Layers that were probed; the second of two depths does better."""
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    monkeypatch.setattr(probing, "DEPTHS", (0.25, 0.5))
    layers: list[int] = []

    def judged(model: object, patch: object, facts: object) -> object:
        layer = int(next(iter(patch.deltas)).split(".")[2])  # type: ignore[attr-defined]
        layers.append(layer)
        return table([{"reliability": layer / 4, "generalization": 1.0, "locality": 1.0}])

    monkeypatch.setattr("gnomon.edit.evaluation.evaluate", judged)
    return layers


def test_a_model_without_a_profile_is_probed_before_its_first_edit_and_never_again(
    counted: list[int], tiny_dir: Path
) -> None:
    with load(tiny_dir, threads=1) as model:
        patch = edit(model, FACT, **QUICK)  # type: ignore[arg-type]
        assert set(counted) == {1, 2} and len(counted) == 2 * len(probing.PROBES)
        assert list(patch.deltas) == [Editor.of(model, corpus="identity").tensor(2)]
        edit(model, FACT, **QUICK)  # type: ignore[arg-type]
    assert len(counted) == 6
    with load(tiny_dir, threads=1) as model:
        assert list(edit(model, FACT, **QUICK).deltas) == list(patch.deltas)  # type: ignore[arg-type]
    assert len(counted) == 6
    (file,) = (cache_dir() / "edit" / "profiles").iterdir()
    assert json.loads(file.read_text())["layer"] == 2


def test_a_layer_that_is_given_probes_nothing(counted: list[int], tiny_dir: Path) -> None:
    with load(tiny_dir, threads=1) as model:
        edit(model, FACT, layers=1, **QUICK)  # type: ignore[arg-type]
    assert counted == []
