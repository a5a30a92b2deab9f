"""What is found on texts: greedy soup, AdaMerging, evolution; files of several documents; merges inside a recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import gnomon
from gnomon.cli.main import run
from gnomon.errors import ConfigError, UsageError
from gnomon.loading import load
from gnomon.merge import learned as learning
from gnomon.merge import merge, method
from gnomon.merge.evolve import evolve, genes_of, with_genes
from gnomon.merge.perplexity import text_loss
from gnomon.merge.remembered import Remembered
from gnomon.models.reference import open_checkpoint

from .conftest import fine_tune

Family = dict[str, Path]
TEXT = "the and in an ou there " * 30
TOKENS = 120


def entries(*models: Path, **parameters: object) -> list[dict[str, Any]]:
    return [{"model": str(m), **({"parameters": parameters} if parameters else {})} for m in models]


def loss(checkpoint: Any) -> float:
    with load(checkpoint, ledger=False, threads=1, max_sequences=1) as model:
        return text_loss(model, TEXT, most_tokens=TOKENS).mean


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_a_greedy_soup_is_the_average_of_what_a_brute_force_search_takes_in(
    family: Family, tmp_path: Path, text: Path
) -> None:
    wild = fine_tune(family["base"], tmp_path / "wild", 5, spread=1.0)
    models = [family["a"], wild, family["b"]]
    soup = merge({"merge_method": "greedy_soup", "models": entries(*models), "data": str(text), "data_tokens": TOKENS})
    order = sorted(models, key=lambda model: loss(open_checkpoint(model)))
    chosen, best = [order[0]], loss(open_checkpoint(order[0]))
    for model in order[1:]:
        tried = loss(merge({"merge_method": "linear", "models": entries(*chosen, model, weight=1.0)}))
        if tried <= best:
            chosen, best = [*chosen, model], tried
    assert wild not in chosen
    plain = merge({"merge_method": "linear", "models": entries(*chosen, weight=1.0)})
    assert all(torch.allclose(soup[name], plain[name], atol=1e-6) for name in plain)


def test_adamerging_lowers_the_entropy_by_weights_of_each_layer(
    family: Family, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learning, "STEPS", 6)
    seen: list[float] = []
    measure = learning._entropy
    monkeypatch.setattr(learning, "_entropy", lambda *a: seen.append(measure(*a)) or seen[-1])
    content = {
        "merge_method": "adamerging", "base_model": str(family["base"]), "models": entries(family["a"], family["b"]),
        "data": str(text), "data_tokens": TOKENS,
    }  # fmt: skip
    merged = merge(content)
    name, base = "model.layers.2.mlp.up_proj.weight", open_checkpoint(family["base"])
    deltas = [open_checkpoint(family[m])[name] - base[name] for m in "ab"]
    basis = torch.stack([d.reshape(-1) for d in deltas], 1).double()
    found = torch.linalg.lstsq(basis, (merged[name] - base[name]).reshape(-1, 1).double())
    weights = found.solution.reshape(-1)
    assert torch.allclose((basis @ weights).float(), (merged[name] - base[name]).reshape(-1), atol=1e-5)
    assert all(0.01 < abs(float(w) - learning.START) < 0.2 for w in weights)
    assert len(seen) == 6 and seen[-1] < seen[0]
    assert merged.identity != merge(content | {"data_tokens": 60}).identity


def test_the_gradient_of_a_weight_is_that_of_the_entropy(family: Family, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against finite differences, on one window."""
    from gnomon.merge.data import Data

    models = [open_checkpoint(family["a"])]
    base = open_checkpoint(family["base"])
    steps: list[float] = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.extend(self.param_groups[0]["params"][0].grad.reshape(-1).tolist())

    monkeypatch.setattr(torch.optim, "Adam", Watched)
    monkeypatch.setattr(learning, "STEPS", 1)
    measured: list[float] = []
    measure = learning._entropy
    monkeypatch.setattr(learning, "_entropy", lambda *a: measured.append(measure(*a)) or measured[-1])
    for start in (0.29, 0.3, 0.31):
        monkeypatch.setattr(learning, "START", start)
        learning.adamerging(models, base, [Data(TEXT, 60)])
    groups = len(steps) // 3
    slope = (measured[2] - measured[0]) / 0.02
    assert sum(steps[groups : 2 * groups]) == pytest.approx(slope, rel=0.03)


def test_methods_that_learn_say_what_they_need(family: Family) -> None:
    with pytest.raises(UsageError, match="Set `data:`"):
        merge({"merge_method": "greedy_soup", "models": entries(family["a"], family["b"])})["model.norm.weight"]
    with pytest.raises(UsageError, match="whole models"):
        method("greedy_soup")([torch.ones(3), torch.ones(3)])


def test_every_model_may_have_its_own_text(family: Family, tmp_path: Path, text: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("ou ou in the " * 40)
    models = entries(family["a"], family["b"])
    shared = merge({"merge_method": "regmean", "models": models, "data": str(text), "data_tokens": TOKENS})
    own = [entry | {"data": str(file)} for entry, file in zip(models, (text, other), strict=True)]
    apart = merge({"merge_method": "regmean", "models": own, "data_tokens": TOKENS})
    name = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(shared[name], apart[name]) and shared.identity != apart.identity


def test_regmean_pp_is_least_squares_on_what_the_merged_layers_below_give(family: Family, tmp_path: Path) -> None:
    """Against a plain computation through transformers, layer by layer, for the first two layers."""
    transformers = pytest.importorskip("transformers")
    files = [tmp_path / "one.txt", tmp_path / "two.txt"]
    for file, words in zip(files, ("the and in an ", "ou there an "), strict=True):
        file.write_text(words * 60)
    models = [entry | {"data": str(f)} for entry, f in zip(entries(family["a"], family["b"]), files, strict=True)]
    content = {"merge_method": "regmean_pp", "models": models, "data_tokens": 90, "parameters": {"alpha": 1.0}}
    merged = merge(content)
    assert torch.equal(merged["model.norm.weight"], merge(content | {"merge_method": "regmean"})["model.norm.weight"])
    own = [transformers.AutoModelForCausalLM.from_pretrained(family[n]).requires_grad_(False) for n in "ab"]
    hybrid = transformers.AutoModelForCausalLM.from_pretrained(family["a"]).requires_grad_(False)
    for p, other in zip(hybrid.parameters(), own[1].parameters(), strict=True):
        p.copy_((p + other) / 2)
    backend = open_checkpoint(family["a"]).tokenizer()
    ids = [torch.tensor([[*backend.backend.encode(f.read_text()).ids]])[:, :90] for f in files]
    for layer in (0, 1):
        name = f"model.layers.{layer}.self_attn.q_proj.weight"
        left = right = torch.zeros((), dtype=torch.float64)
        for model, tokens in zip(own, ids, strict=True):
            mixed = transformers.AutoModelForCausalLM.from_pretrained(family["a"]).requires_grad_(False)
            mixed.load_state_dict(hybrid.state_dict())
            mixed.model.layers[layer].load_state_dict(model.model.layers[layer].state_dict())
            seen: list[torch.Tensor] = []
            part = mixed.model.layers[layer].self_attn.q_proj
            part.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0][0].double()))
            mixed(input_ids=tokens)
            gram = seen[0].T @ seen[0]
            left, right = left + gram, right + gram @ part.weight.double().T
        wanted = torch.linalg.lstsq(left, right).solution.T.float()
        x = torch.cat(seen).float()
        assert torch.allclose(x @ merged[name].T, x @ wanted.T, atol=1e-3), layer
        hybrid.load_state_dict({n: merged[n] if f"layers.{layer}." in n else t for n, t in hybrid.state_dict().items()})


def test_a_genome_becomes_a_merge_file(family: Family) -> None:
    content = {"merge_method": "linear", "models": entries(family["a"], family["b"])}
    genes = genes_of(content, ["weight"], layers=4, group=3)
    assert [(g.model, g.layers) for g in genes] == [(0, (0, 3)), (1, (0, 3)), (0, (3, 4)), (1, (3, 4))]
    made = merge(with_genes(content, genes, [1.0, 0.0, 0.25, 0.75]))
    a, b = (open_checkpoint(family[n]) for n in "ab")
    for name, share in (("model.layers.1.mlp.up_proj.weight", 1.0), ("model.layers.3.mlp.up_proj.weight", 0.25)):
        assert torch.allclose(made[name], share * a[name] + (1 - share) * b[name], atol=1e-6)
    with pytest.raises(UsageError, match="cannot evolve"):
        genes_of({"merge_method": "karcher", "models": content["models"]}, ["weight"], 4, None)
    with pytest.raises(UsageError, match=r"`density` of `linear` does not evolve\. These do: weight"):
        genes_of(content, ["density"], 4, None)


def test_evolution_finds_the_model_that_knows_the_text_and_reports_on_what_it_did_not_see(
    family: Family, tmp_path: Path
) -> None:
    pytest.importorskip("cma")
    wild = fine_tune(family["base"], tmp_path / "wild", 5, spread=0.5)
    file = tmp_path / "merge.yaml"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries(family["a"], wild)}))
    runs = [evolve(file, {"t": TEXT}, budget=14, most_tokens=60, seed=1, threads=1) for _ in range(2)]
    assert runs[0] == runs[1]
    found = runs[0]
    assert found.evaluations == len(found.history) == 14
    assert found.seen[1] == min(found.history) < found.seen[0]
    shares = [entry["parameters"]["weight"] for entry in found.content["models"]]
    assert abs(shares[1]) < abs(shares[0])
    assert found.held_out[1] == pytest.approx(
        _half_loss(merge(found.content), TEXT[len(TEXT) // 2 :]), abs=1e-9
    )  # the second half, nothing else


def test_a_stopped_search_goes_on_where_it_was_and_finds_the_same(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("cma")
    file, journal = tmp_path / "merge.yaml", tmp_path / "best.yaml.partial"
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries(family["a"], family["b"])}))
    options: dict[str, Any] = {"budget": 8, "most_tokens": 30, "seed": 3, "threads": 1}

    def stop(step: int, _: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evolve(file, {"t": TEXT}, journal=journal, on_step=stop, **options)
    lines = journal.read_text()
    assert lines.count("\n") == 1 + 5
    journal.write_text(lines + '{"candidate": "cut sh')  # what a kill leaves
    measured: list[int] = []
    of = Remembered.of
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Remembered, "of", lambda s, c, m: of(s, c, lambda: (measured.append(1), m())[1]))
        again = evolve(file, {"t": TEXT}, journal=journal, **options)
    assert len(measured) == 8 - 5 and not journal.exists()
    assert again == evolve(file, {"t": TEXT}, **options)
    journal.write_text(lines)  # of another search: another seed
    assert Remembered(journal, "another").recalled == 0


@pytest.mark.slow
def test_a_search_on_ray_finds_the_same(family: Family, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    content = {"merge_method": "linear", "models": entries(family["a"], family["b"]), "dtype": "float32"}
    file = tmp_path / "evolve.yaml"
    file.write_text(yaml.safe_dump(content))
    options: dict[str, Any] = {"budget": 6, "most_tokens": 40, "seed": 1, "threads": 1}
    assert evolve(file, {"t": TEXT}, ray="local", **options) == evolve(file, {"t": TEXT}, **options)


def _half_loss(checkpoint: Any, text: str) -> float:
    with load(checkpoint, ledger=False, max_sequences=1) as model:
        return text_loss(model, text, most_tokens=60).mean


def test_multi_writes_every_document_and_the_same_result_as_run(family: Family, tmp_path: Path) -> None:
    first = {"name": "half", "merge_method": "linear", "models": entries(family["a"], family["b"], weight=1.0)}
    second = {"merge_method": "linear", "models": [*entries(family["c"], weight=1.0)]}
    second["models"].append({"model": "half", "parameters": {"weight": 2.0}})
    file = tmp_path / "multi.yaml"
    file.write_text(yaml.safe_dump_all([second, first]))
    assert run(["merge", "multi", str(file), str(tmp_path / "out"), "-I", str(tmp_path / "parts")]) == 0
    assert run(["merge", "run", str(file), str(tmp_path / "direct")]) == 0
    half, direct, out = (open_checkpoint(tmp_path / p) for p in ("parts/half", "direct", "out"))
    a, b = (open_checkpoint(family[n]) for n in "ab")
    for name in half:
        assert torch.equal(half[name], (a[name] + b[name]) / 2)
        assert torch.equal(direct[name], out[name])


def test_a_recipe_may_hold_a_merge(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "gnomon.yaml"
    content = {"merge_method": "linear", "models": [{"model": f"./{n}", "parameters": {"weight": 1}} for n in "ab"]}
    for name in "ab":
        (tmp_path / name).symlink_to(family[name])
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "merge": content, "sampling": {"max_tokens": 4}}))
    with gnomon.load(recipe, ledger=False) as model:
        assert model.checkpoint.identity == merge(content_of(content, tmp_path)).identity
        assert len(model.generate("the").token_ids) <= 4
        told = model.fingerprint
    monkeypatch.chdir(tmp_path.parent)  # its paths start where it lies, for commands too
    assert run(["generate", "the", "-m", str(recipe), "--json", "--profile", "fp32"]) == 0
    assert json.loads(capsys.readouterr().out)["fingerprint"] == told
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "merge": content, "model": "./a"}))
    assert run(["generate", "the", "-m", str(recipe)]) == 2
    assert "both `model` and `merge` are given" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="both `model` and `merge`"):
        gnomon.load(recipe)
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "merge": {**content, "merge_method": "tise"}}))
    with pytest.raises(gnomon.errors.GnomonError, match="Did you mean `ties`"):
        gnomon.load(recipe)


def content_of(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    models = [entry | {"model": str(folder / entry["model"])} for entry in content["models"]]
    return content | {"models": models}
