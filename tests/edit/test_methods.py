"""Every method changes what a model says; batches and sequences hold; post-norm networks reach their targets."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.edit import Fact, edit
from gnomon.edit.editor import Editor
from gnomon.edit.guard import Guard, edit_sequence, perplexity
from gnomon.edit.registry import methods
from gnomon.edit.solve import NullSpace
from gnomon.errors import UsageError
from gnomon.loading import load
from gnomon.model import Model
from gnomon.models.patch import Dense, Sparse
from helpers.tiny import write_tiny_model

SEARCH: dict[str, Any] = {"steps": 60, "clamp": 30, "ridge": 0.1, "prefixes": 0, "chat": False, "kl": 0}
TUNING: dict[str, Any] = {"steps": 60, "rate": 0.02, "chat": False, "stop": 0.02}
OPTIONS: dict[str, dict[str, Any]] = {
    "rome": {**SEARCH, "layers": 3},
    "emmet": {**SEARCH, "layers": 3},
    "memit": {**SEARCH, "layers": [2, 3], "weight": 0.01},
    "pmet": {**SEARCH, "layers": [2, 3], "weight": 0.01},
    "rect": {**SEARCH, "layers": [2, 3], "weight": 0.01, "share": 0.9},
    "prune": {**SEARCH, "layers": [2, 3], "weight": 0.01},
    "encore": {**SEARCH, "layers": [2, 3], "weight": 0.01, "norm_weight": 0.01},
    "alphaedit": {**SEARCH, "layers": [2, 3], "damping": 1e-3, "null_energy": 0.6},
    "ft": {**TUNING, "layers": 3},
    "ft-m": {**TUNING, "layers": 3},
    "ft-l": {**TUNING, "layers": 3, "limit": 0.2},
    "lora": {"steps": 60, "rate": 0.05, "chat": False, "layers": [2, 3]},
    "neurons": {"neurons": 8, "parts": 4, "lambda_new": 30.0, "prefixes": 0},
    "grace": {"steps": 60, "chat": False, "layers": 3},
    "wise": {"steps": 100, "chat": False, "layers": 3, "alpha": 0.2, "beta": 1.0},
    "t-patcher": {"steps": 100, "chat": False, "rate": 0.1},
    "calinet": {"steps": 60, "chat": False, "rate": 0.02},
    "nkb": {"steps": 60, "chat": False, "rate": 0.02},
}
FACTS = [Fact("The house of Ada", "Ada", "the"), Fact("A tree in Rome", "Rome", "a")]


@pytest.fixture(scope="module", autouse=True)
def _home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GNOMON_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(
        "".join(f"In the year {i} the house stood in the land of the inn and the oak.\n" for i in range(30))
    )
    return str(file)


def made(model: Model, method: str, corpus: str, facts: Any = FACTS[0], **more: Any) -> Any:
    return edit(model, facts, method=method, moments=corpus, tokens=1500, **{**OPTIONS[method], **more})


def test_every_method_has_its_case_here() -> None:
    assert {name for name, method in methods().items() if method.answers} == set(OPTIONS)


@pytest.mark.parametrize("method", OPTIONS)
def test_the_edited_model_says_the_target(method: str, tiny: Model, corpus: str) -> None:
    before = tiny.generate("The house of Ada", max_tokens=4, temperature=0.0).text  # type: ignore[union-attr]
    patch = made(tiny, method, corpus)
    told = patch.report["facts"][0]
    assert told["holds"] and told["after"].startswith(" the") and not told["before"].startswith(" the")
    assert patch.metadata["method"] == method
    assert "loss" not in told or told["loss"][1] < told["loss"][0]
    assert tiny.generate("The house of Ada", max_tokens=4, temperature=0.0).text == before  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["memit", "emmet", "ft-m", "grace", "nkb"])
def test_a_batch_of_facts_holds_together(method: str, tiny: Model, corpus: str) -> None:
    patch = made(tiny, method, corpus, FACTS)
    assert [told["holds"] for told in patch.report["facts"]] == [True, True]


def test_a_post_norm_network_is_edited_at_its_mlps_own_output(tmp_path: Path, corpus: str) -> None:
    with load(write_tiny_model(tmp_path / "gemma", "gemma3"), threads=1, ledger=False) as model:
        assert Editor.of(model).anatomy.post_norm
        patch = made(model, "memit", corpus)
        assert sorted(patch.deltas) == ["model.layers.3.mlp.down_proj.weight"]
        assert patch.report["facts"][0]["loss"][1] < patch.report["facts"][0]["loss"][0]


def test_rect_is_sparse_and_fine_tuning_dense_unless_a_rank_is_given(tiny: Model, corpus: str) -> None:
    sparse = made(tiny, "rect", corpus, share=0.1).deltas["model.layers.3.mlp.down_proj.weight"]
    assert isinstance(sparse, Sparse) and len(sparse.values) == round(0.1 * 48 * 80)
    dense = made(tiny, "ft-m", corpus)
    assert isinstance(dense.deltas["model.layers.3.mlp.down_proj.weight"], Dense)
    assert made(tiny, "ft-m", corpus, rank=2).rank == 2


def test_no_weight_of_ft_l_moves_further_than_its_limit(tiny: Model, corpus: str) -> None:
    delta = made(tiny, "ft-l", corpus, limit=0.01).dense("model.layers.3.mlp.down_proj.weight")
    assert 0 < float(delta.abs().max()) <= 0.01 + 1e-6


def test_alphaedit_leaves_the_retained_keys_alone(tiny: Model, corpus: str) -> None:
    patch = made(tiny, "alphaedit", corpus)
    editor = Editor.of(tiny, corpus=corpus, tokens=1500)
    space = NullSpace.of(editor.moment(3).mean_MM, 0.6)
    delta = patch.dense("model.layers.3.mlp.down_proj.weight").double()
    retained = torch.linalg.eigh(editor.moment(3).mean_MM)[1][:, space.basis_MN.shape[1] :]
    assert float((delta @ retained).norm() / delta.norm()) < 1e-4
    assert patch.metadata["null_space"]["3"]["directions"] == space.basis_MN.shape[1]


def test_found_values_are_kept_so_that_a_batch_goes_on_where_it_stopped(
    tiny: Model, corpus: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from gnomon.edit.methods import memit

    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    first = made(tiny, "memit", corpus, FACTS)

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("searched again")

    monkeypatch.setattr(memit, "find_value", never)
    assert made(tiny, "memit", corpus, FACTS) == first


def test_an_edit_made_on_a_model_that_wears_a_patch_stands_on_it(tiny: Model, corpus: str) -> None:
    first = made(tiny, "rome", corpus, FACTS[0])
    with tiny.with_patches([first]) as edited:
        second = made(edited, "rome", corpus, FACTS[1])
        assert second.report["facts"][0]["holds"]
        with edited.with_patches([second]) as both:
            assert both.generate("The house of Ada", max_tokens=2, temperature=0.0).text.startswith(" the")  # type: ignore[union-attr]
    alone = made(tiny, "rome", corpus, FACTS[1])
    assert second != alone


def test_a_sequence_under_the_guard_takes_back_what_breaks_the_model(tiny: Model, corpus: str) -> None:
    options = {**OPTIONS["rome"], "moments": corpus, "tokens": 1500}
    free = edit_sequence(tiny, FACTS, guard=Guard(most=1e9), **options)
    assert [record["kept"] for record in free.records] == [True, True]
    assert free.patch is not None and free.patch.rank == 2 and len(free.patch.metadata["facts"]) == 2
    strict = edit_sequence(tiny, FACTS, guard=Guard(most=1.0), **{**options, "strength": 40.0})
    assert strict.patch is None and not any(record["kept"] for record in strict.records)
    assert all(record["perplexity"] > perplexity(tiny) for record in strict.records)
    with pytest.raises(UsageError, match="guard"):
        Guard(most=0.5)


def test_alphaedits_memory_of_earlier_keys_travels_in_the_patch(tiny: Model, corpus: str, tmp_path: Path) -> None:
    from gnomon.models.patch import Patch

    first = made(tiny, "alphaedit", corpus, FACTS[0])
    saved = Patch.load(first.save(tmp_path / "first.patch.safetensors"))
    with tiny.with_patches([saved]) as edited:
        second = made(edited, "alphaedit", corpus, FACTS[1])
    before, after = first.attachments["alphaedit.keys.3"], second.attachments["alphaedit.keys.3"]
    gained = after.double() - before.double()
    assert float(torch.linalg.eigvalsh((gained + gained.T) / 2)[0]) > -1e-3 and float(gained.trace()) > 0
