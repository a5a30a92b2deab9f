"""Another tokenizer for a model: what stays, and that the new rows are right where the right ones are known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from gnomon.cli.main import run
from gnomon.errors import MergeError, UsageError
from gnomon.loading import load
from gnomon.merge.transplant import matching_pursuit, transplant
from gnomon.models.reference import open_checkpoint

from .conftest import fine_tune

Family = dict[str, Path]


def renamed(path: Path, names: dict[str, str]) -> None:
    """Some tokens of a tokenizer under other names: to everybody else, other tokens."""
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    content["model"]["vocab"] = {names.get(token, token): row for token, row in vocabulary.items()}
    content["model"]["merges"] = []
    (path / "tokenizer.json").write_text(json.dumps(content))
    Tokenizer.from_file(str(path / "tokenizer.json"))


def test_rows_of_tokens_that_a_rotated_model_calls_otherwise_are_found_again(family: Family, tmp_path: Path) -> None:
    """The donor's tables are the model's, rotated: a combination that fits there fits here."""
    donor = fine_tune(family["base"], tmp_path / "donor", 3, spread=0.0)
    vocabulary = open_checkpoint(donor).tokenizer().backend.get_vocab(with_added_tokens=False)
    strange = [token for token in sorted(vocabulary) if token.isalpha()][:9]
    renamed(donor, {token: f"strange{place}" for place, token in enumerate(strange)})
    tensors = load_file(donor / "model.safetensors")
    turn = torch.linalg.qr(torch.randn(48, 48, generator=torch.Generator().manual_seed(0))).Q
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name] @ turn
    save_file(tensors, donor / "model.safetensors")
    model, made = (
        open_checkpoint(family["base"]),
        transplant(open_checkpoint(family["base"]), open_checkpoint(donor), atoms=48),
    )
    for name in model:
        assert torch.allclose(made[name], model[name], atol=2e-3 if "embed" in name or "head" in name else 0), name
    rows = torch.ones(300, dtype=torch.bool)
    rows[[vocabulary[token] for token in strange]] = False
    table = "model.embed_tokens.weight"
    assert torch.equal(made[table][rows], model[table][rows])
    few = transplant(model, open_checkpoint(donor), atoms=2)
    assert not torch.allclose(few[table], model[table], atol=2e-3)


def test_the_command_writes_a_model_that_speaks_the_donors_tokens(family: Family, tmp_path: Path) -> None:
    donor = fine_tune(family["a"], tmp_path / "donor", 3, spread=0.0)
    renamed(donor, {"the": "strange"})
    out = tmp_path / "out"
    assert run(["merge", "transplant", str(family["base"]), str(donor), str(out), "--atoms", "4"]) == 0
    with load(out, ledger=False, threads=1, max_sequences=1) as model:
        assert "strange" in model.tokenizer.backend.get_vocab()
        assert len(model.generate("in an", max_tokens=3, ignore_eos=True).token_ids) == 3
    same = transplant(open_checkpoint(family["base"]), open_checkpoint(family["a"]))
    assert all(torch.equal(same[name], t) for name, t in open_checkpoint(family["base"]).items())


def test_pursuit_picks_what_a_brute_force_search_would_for_one_atom() -> None:
    generator = torch.Generator().manual_seed(4)
    targets, atoms = torch.randn(6, 5, generator=generator), torch.randn(20, 5, generator=generator)
    chosen, weights = matching_pursuit(targets, atoms, 1)
    for target, place, weight in zip(targets, chosen[:, 0], weights[:, 0], strict=True):
        errors = [float((target - a * (target @ a) / (a @ a)).norm()) for a in atoms]
        assert int(place) == min(range(20), key=errors.__getitem__)
        assert float(weight) == pytest.approx(float(target @ atoms[place] / (atoms[place] @ atoms[place])), rel=1e-5)
    errors_by_count = [
        float((targets - (atoms[c] * w.unsqueeze(-1)).sum(1)).norm())
        for c, w in (matching_pursuit(targets, atoms, count) for count in range(1, 6))
    ]
    assert errors_by_count == sorted(errors_by_count, reverse=True) and errors_by_count[-1] < 1e-5


def test_what_a_transplant_cannot_be_is_said(family: Family, tmp_path: Path) -> None:
    model = open_checkpoint(family["base"])
    with pytest.raises(UsageError, match="omp, mean, zero"):
        transplant(model, model, method="magic")
    donor = fine_tune(family["base"], tmp_path / "donor", 3)
    content = json.loads((donor / "tokenizer.json").read_text())
    content["model"]["vocab"] = {f"@{token}": row for token, row in content["model"]["vocab"].items()}
    content["model"]["merges"], content["added_tokens"] = [], []
    (donor / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(MergeError, match="no token in common"):
        transplant(model, open_checkpoint(donor))
