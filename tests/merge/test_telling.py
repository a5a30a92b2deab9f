"""Telling before and after: check, report, sweep; and the methods that look at data or at whole matrices."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml

from gnomon.cli.main import run
from gnomon.errors import MergeError, UsageError
from gnomon.loading import load
from gnomon.merge import merge, method
from gnomon.merge.build import open_merge
from gnomon.merge.check import check
from gnomon.merge.perplexity import halves, read_text, text_loss
from gnomon.merge.report import report
from gnomon.merge.report_page import write_html
from gnomon.merge.sweep import parse_sweep, sweep, with_value
from gnomon.models.reference import open_checkpoint, open_path
from helpers.tiny import write_tiny_model

from .conftest import fine_tune, ties_file

Family = dict[str, Path]


def linear(*models: Path, **more: object) -> dict[str, object]:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    return {"merge_method": "linear", "models": entries} | more


def test_a_good_merge_is_found_good_and_its_distances_are_true(family: Family, tmp_path: Path) -> None:
    found = check(ties_file(tmp_path / "merge.yaml", family))
    assert found.ok and not [finding for finding in found.findings if finding.level != "note"]
    tuned, base = merge(linear(family["a"])), merge(linear(family["base"]))
    delta = sum(float((tuned[n].double() - base[n].double()).square().sum()) for n in base)
    square = sum(float(base[n].double().square().sum()) for n in base)
    assert found.distances[str(family["a"])] == pytest.approx((delta / square) ** 0.5, rel=1e-5)
    assert all(abs(value) < 0.05 for value in found.cosines.values())  # independent noise
    assert found.sign_conflicts == pytest.approx(0.75, abs=0.02)  # of three independent signs


def test_models_of_other_bases_and_words_are_warned_of_and_what_cannot_be_is_an_error(
    family: Family, tmp_path: Path
) -> None:
    stranger = write_tiny_model(tmp_path / "stranger", seed=77)
    base = {"merge_method": "task_arithmetic", "base_model": str(family["base"])}
    entries = [{"model": str(m), "parameters": {"weight": 1}} for m in (family["a"], stranger)]
    found = check(base | {"models": entries})
    assert found.ok and any("hardly a fine-tune of this base" in f.what for f in found.findings)
    assert any("hardly share a base" in f.what for f in check(linear(family["a"], stranger)).findings)
    wide = write_tiny_model(tmp_path / "wide", hidden_size=64)
    impossible = check(linear(family["a"], wide))
    assert not impossible.ok and any("hidden size" in f.what for f in impossible.findings)
    broken = fine_tune(family["base"], tmp_path / "broken", 9, spread=float("inf"))
    assert any("NaN or infinite" in f.what for f in check(linear(family["a"], broken)).findings)
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(linear(family["a"], wide)))
    assert run(["merge", "check", str(file)]) == 1


def test_the_report_says_per_layer_what_came_of_it(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "merge.yaml", family, merge_method="task_arithmetic")
    merged = open_merge(file)
    found = report(merged, text="abc and the others in a row", most_tokens=20)
    assert [group.name for group in found.groups] == [*(f"layer {i}" for i in range(4)), "outside of the layers"]
    a = str(family["a"])
    # half the sum of three independent vectors: its cosine with each is 1 / sqrt(3)
    assert found.whole.cosine[a] == pytest.approx(3**-0.5, abs=0.03)
    assert found.whole.relative["merge"] == pytest.approx(found.whole.relative[a] * 0.5 * 3**0.5, rel=0.03)
    assert set(found.perplexity) == {*merged.models, "merge"} and found.whole.nonfinite == 0
    write_html(found, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert page.startswith("<!doctype html>") and "layer 3" in page and "<script" not in page and "http" not in page
    assert page.count("<polyline") == 4 + 3 and page.count("<svg") == 2
    assert json.loads(json.dumps(found.to_dict()))["method"] == "task_arithmetic"
    with pytest.raises(MergeError, match=r"is no result of this merge: `lm_head\.weight` is missing"):
        report(merged, result=open_checkpoint(write_tiny_model(tmp_path / "tied", tie_word_embeddings=True)))


def test_a_sweep_measures_every_value_and_finds_the_best(family: Family, tmp_path: Path) -> None:
    assert parse_sweep("weight=0:1:0.25") == ("weight", [0, 0.25, 0.5, 0.75, 1])
    assert parse_sweep("lambda=0.5,2") == ("lambda", [0.5, 2])
    for wrong in ("weight", "weight=1:0:0.1", "weight=a,b", "weight=0:1:0"):
        with pytest.raises(UsageError, match="no sweep"):
            parse_sweep(wrong)
    file = ties_file(tmp_path / "merge.yaml", family, merge_method="task_arithmetic")
    content = yaml.safe_load(file.read_text())
    assert all("weight" not in entry["parameters"] for entry in with_value(content, "weight", 0.2)["models"])
    assert with_value(content, "models[1].weight", 0.2)["models"][1]["parameters"]["weight"] == 0.2
    with pytest.raises(UsageError, match="Did you mean `weight`"):
        with_value(content, "wieght", 1)
    found = sweep(file, "weight", [0.0, 3.0], {"text": "the and in an ou the and" * 6}, most_tokens=60)
    base = merge(linear(family["base"]))
    assert [point.value for point in found.points] == [0.0, 3.0] and found.best.mean == min(
        point.mean for point in found.points
    )
    zero = open_merge(with_value(content, "weight", 0.0))
    assert all(torch.equal(zero[name], base[name]) for name in base)


def random_family(shape: tuple[int, int], count: int = 3) -> tuple[torch.Tensor, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(shape, generator=generator)
    return base, [base + 0.1 * torch.randn(shape, generator=generator) for _ in range(count)]


def test_tsv_m_gives_tasks_orthogonal_singular_vectors() -> None:
    base, tensors = random_family((24, 16), 2)
    u, s, v = torch.linalg.svd(method("tsv_m")(tensors, base=base, name="layers.0.w") - base)
    kept = [torch.linalg.svdvals(t - base)[:8] for t in tensors]
    assert torch.allclose(s, torch.cat(kept).sort(descending=True).values, atol=1e-5)
    one = method("tsv_m")(tensors[:1], base=base, name="layers.0.w")
    assert torch.allclose(one, tensors[0], atol=1e-6)
    assert u.shape[0] == 24 and v.shape[0] == 16


def test_iso_c_flattens_the_spectrum_of_the_sum_to_its_mean() -> None:
    base, tensors = random_family((24, 16))
    values = torch.linalg.svdvals(method("iso_c")(tensors, base=base, name="layers.0.w") - base)
    mean = torch.linalg.svdvals(sum((t - base for t in tensors), torch.zeros_like(base))).mean()
    assert torch.allclose(values, mean.expand(16), rtol=1e-4)


def test_knots_of_one_task_is_that_task_and_of_equal_tasks_their_common_one() -> None:
    base, tensors = random_family((24, 16), 1)
    for count in (1, 3):
        merged = method("knots")(tensors * count, base=base, name="layers.0.w")
        assert torch.allclose(merged, tensors[0], atol=1e-5)


@pytest.mark.parametrize("name", ["tsv_m", "iso_c", "knots"])
def test_what_is_no_matrix_is_averaged(name: str) -> None:
    base, tensors = random_family((1, 16))
    merged = method(name)([t[0] for t in tensors], base=base[0])
    assert torch.allclose(merged, torch.stack([t[0] for t in tensors]).mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["regmean", "fisher"])
def test_methods_that_look_at_data_say_so_and_of_equal_models_give_the_model(
    name: str, family: Family, tmp_path: Path
) -> None:
    content = {"merge_method": name, "models": [{"model": str(family["a"])}, {"model": str(family["b"])}]}
    with pytest.raises(UsageError, match="Set `data:`"):
        merge(content)["model.layers.0.mlp.up_proj.weight"]
    text = tmp_path / "text.txt"
    text.write_text("the and in an ou there " * 40)
    both = merge(content | {"data": str(text), "data_tokens": 200})
    plain = merge(linear(family["a"], family["b"]))
    changed = [n for n in both if not torch.allclose(both[n], plain[n], atol=1e-6)]
    assert "model.layers.0.mlp.up_proj.weight" in changed
    assert ("model.norm.weight" in changed) == (name == "fisher")
    twice = {"merge_method": name, "models": [{"model": str(family["a"])}, {"model": str(family["a"])}]}
    same = merge(twice | {"data": str(text), "data_tokens": 200})
    one = merge(linear(family["a"]))
    assert all(torch.allclose(same[n], one[n], atol=1e-4) for n in one)
    assert both.identity != merge(content | {"data": str(text), "data_tokens": 100}).identity


def test_regmean_is_nearer_to_both_models_outputs_than_their_average_is(family: Family, tmp_path: Path) -> None:
    from gnomon.merge.blocks import TensorView, tensor_reader
    from gnomon.merge.randomness import CounterRandomness
    from gnomon.merge.registry import find_method
    from gnomon.merge.tensors import merge_view

    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(200, 12, generator=generator) * torch.linspace(s, 1, 12) for s in (0.05, 3.0)]
    weights = [torch.randn(8, 12, generator=generator) for _ in inputs]
    readers = [tensor_reader(w) for w in weights]
    grams = [x.T @ x for x in inputs]
    view = TensorView("w", (8, 12), readers, None, torch.float32, CounterRandomness(), statistics=grams)
    found = find_method("regmean")
    merged = merge_view(found, view, found.resolve({"alpha": 1.0}, 2), torch.float32)

    def error(w: torch.Tensor) -> float:
        return sum(float((x @ (w - own).T).square().sum()) for x, own in zip(inputs, weights, strict=True))

    average = torch.stack(weights).mean(0)
    assert error(merged) < 0.8 * error(average)
    assert all(error(merged) <= error(merged + 0.01 * torch.randn(8, 12, generator=generator)) for _ in range(20))


def test_of_examples_only_the_completions_are_counted(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "task.jsonl"
    pairs = [("the and in", " an ou there"), ("ou", " in an"), ("an in", " the")]
    file.write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))
    examples = read_text(file)
    with load(open_path(family["a"]), ledger=False) as model:
        found = text_loss(model, examples)
        for (prompt, completion), (loss, count) in zip(pairs, found.windows, strict=True):
            ids, given = model.encode(prompt + completion), len(model.encode(prompt))
            rows = torch.log_softmax(model.worker.logits(ids).float(), -1)
            wanted = -sum(float(rows[i - 1, ids[i]]) for i in range(given, len(ids)))
            assert count == len(ids) - given and abs(loss - wanted) < 1e-4
        read = len(model.encode("".join(pairs[0])))
        assert len(text_loss(model, examples, most_tokens=read).windows) == 1
    first, second = halves(examples)
    assert (len(first.pairs), len(second.pairs)) == (1, 2)  # type: ignore[union-attr]
    assert str(examples).startswith("the and in an ou there\n\n")
    file.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": 3}\n')
    with pytest.raises(UsageError, match=r"task\.jsonl, line 2: no example"):
        read_text(file)


def test_a_share_outside_of_its_range_is_told_with_file_and_tensor(family: Family, tmp_path: Path) -> None:
    content = linear(family["a"], family["b"]) | {"merge_method": "ties", "base_model": str(family["base"])}
    content["parameters"] = {"density": 1.5}
    with pytest.raises(UsageError, match=r"merge, tensor `.*`: `density` must lie between 0 and 1, not 1\.5"):
        merge(content)
