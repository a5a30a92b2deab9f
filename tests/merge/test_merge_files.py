"""Merge files: what they mean, what is refused, and that a merge is a model like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import gnomon
from gnomon.cli.main import run
from gnomon.errors import ConfigError, MergeError, UsageError
from gnomon.merge import forecast as forecasting
from gnomon.merge import merge
from gnomon.merge.build import MergeRun, open_merge
from gnomon.merge.forecast import forecast
from gnomon.merge.settings import MISSING, Setting
from gnomon.model import Model

from .conftest import fine_tune, ties_file

Family = dict[str, Path]


def write(path: Path, content: Any) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def linear(*models: tuple[Any, Any], **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model), "parameters": {"weight": weight}} for model, weight in models]
    return {"merge_method": "linear", "models": entries} | more


def test_gradients_interpolate_and_filters_are_substrings_the_first_that_fits_wins() -> None:
    gradient = Setting.parse([0, 1, 4], "x")
    assert [gradient.at("any", t) for t in (0, 0.25, 0.5, 0.75, 1)] == [0, 0.5, 1, 2.5, 4]
    filtered = Setting.parse([{"filter": "mlp", "value": [0, 1]}, {"filter": "*", "value": 7}], "x")
    assert filtered.at("layers.0.mlp.up", 0.5) == 0.5 and filtered.at("norm", 0.5) == 7
    assert Setting.parse([{"filter": "mlp", "value": 1}], "x").at("norm", 0) is MISSING
    assert Setting.parse([True, False], "x").at("any", 0.4) is True


def test_the_nearest_level_wins_and_a_filter_without_a_hit_falls_through(family: Family) -> None:
    sources = [
        {"model": str(family["a"]), "layer_range": [0, 4], "parameters": {"weight": [{"filter": "mlp", "value": 1}]}},
        {"model": str(family["b"]), "layer_range": [0, 4], "parameters": {"weight": 3}},
    ]
    content = {
        "merge_method": "linear",
        "slices": [{"sources": sources, "parameters": {"weight": [{"filter": "self_attn", "value": 2}]}}],
        "parameters": {"weight": 5, "normalize": False},
    }
    plans = {tensor.name: tensor for tensor in open_merge(content).plan.tensors}
    assert plans["model.layers.0.mlp.up_proj.weight"].parameters["weight"] == [1.0, 3.0]
    assert plans["model.layers.0.self_attn.q_proj.weight"].parameters["weight"] == [2.0, 3.0]
    assert plans["model.norm.weight"].parameters["weight"] == [5.0, 3.0]
    assert all(plan.parameters["normalize"] is False for plan in plans.values())


def test_layers_are_stacked_and_what_follows_them_comes_from_the_last_slice(family: Family) -> None:
    slices = [
        {"sources": [{"model": str(family["a"]), "layer_range": [0, 3]}]},
        {"sources": [{"model": str(family["b"]), "layer_range": [1, 4]}]},
    ]
    merged = merge({"merge_method": "passthrough", "slices": slices})
    a, b = load_file(family["a"] / "model.safetensors"), load_file(family["b"] / "model.safetensors")
    assert merged.config["num_hidden_layers"] == 6
    for name, source, own in (
        ("model.embed_tokens.weight", a, "model.embed_tokens.weight"),
        ("model.layers.2.mlp.up_proj.weight", a, "model.layers.2.mlp.up_proj.weight"),
        ("model.layers.3.mlp.up_proj.weight", b, "model.layers.1.mlp.up_proj.weight"),
        ("model.norm.weight", b, "model.norm.weight"),
        ("lm_head.weight", b, "lm_head.weight"),
    ):
        assert torch.equal(merged[name], source[own]), name
    assert len(merged) == 3 + 6 * 9


def test_a_merge_file_is_a_model_reference_everywhere(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    written = merge(file, out=tmp_path / "out")
    recipe = write(tmp_path / "gnomon.yaml", {"gnomon": 1, "model": "./merge.yaml", "sampling": {"max_tokens": 6}})
    with gnomon.load(file, threads=1) as lazy, gnomon.load(tmp_path / "out", threads=1) as stored:
        assert lazy.generate("abc", max_tokens=6).token_ids == stored.generate("abc", max_tokens=6).token_ids
    with gnomon.load(recipe, threads=1) as by_recipe, gnomon.load(tmp_path / "out", threads=1) as stored:
        assert by_recipe.generate("abc").token_ids == stored.generate("abc", max_tokens=6).token_ids
    assert (tmp_path / "out" / "tokenizer.json").exists() and written.chat_template
    assert run(["show", str(file)]) == 0


def test_two_equal_merges_have_one_identity_and_every_change_gives_another(family: Family, tmp_path: Path) -> None:
    one = merge(ties_file(tmp_path / "one.yaml", family)).identity
    assert merge(ties_file(tmp_path / "two.yaml", family)).identity == one
    others = [
        merge(ties_file(tmp_path / "three.yaml", family, parameters={"lambda": 0.9})).identity,
        merge(ties_file(tmp_path / "four.yaml", family, dtype="bfloat16")).identity,
        merge(tmp_path / "one.yaml", compat=True).identity,
    ]
    assert len({one, *others}) == 4
    assert merge(tmp_path / "one.yaml", seed=9).identity == one  # nothing in it is drawn


def test_a_file_of_several_documents_builds_on_its_own_parts(family: Family, tmp_path: Path) -> None:
    first = linear((family["a"], 1), (family["b"], 1), name="half")
    last = linear(("half", 2), (family["c"], 1))
    file = tmp_path / "multi.yaml"
    file.write_text(yaml.safe_dump_all([last, first]))
    direct = merge(linear((family["a"], 1), (family["b"], 1), (family["c"], 1)))
    for name, tensor in merge(file).items():
        assert torch.allclose(tensor, direct[name], atol=1e-6)
    file.write_text(yaml.safe_dump_all([linear(("two", 1), name="one"), linear(("one", 1), name="two"), last]))
    with pytest.raises(ConfigError, match="refer to each other"):
        merge(file)


def test_a_merge_file_that_leads_to_itself_is_refused(family: Family, tmp_path: Path) -> None:
    write(tmp_path / "x.yaml", linear(("y.yaml", 1)))
    write(tmp_path / "y.yaml", linear(("x.yaml", 1)))
    with pytest.raises(MergeError, match=r"x\.yaml -> y\.yaml -> x\.yaml"):
        merge(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"merge_method": "tiess"}, "Did you mean `ties`"),
        ({"bse_model": "x"}, r"unknown key `bse_model`.*Did you mean `base_model`"),
        ({"parameters": {"densitty": 1}}, r"unknown parameter `densitty`.*Did you mean `density`"),
        ({"parameters": {"density": 2}, "models": "ab"}, "between 0 and 1"),
        ({"dtype": "float12"}, "dtype"),
        ({"slices": []}, None),
        ({"models": []}, "exactly one of models"),
        ({"tokenizer_source": "base", "tokenizer": {"source": "base"}}, "exclude each other"),
        ({"chat_template": "short"}, "Jinja"),
        ({"base_model": None}, "needs a base model"),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(
    family: Family, tmp_path: Path, change: dict[str, Any], message: str | None
) -> None:
    if change.get("models") == "ab":
        change = change | {"models": [{"model": str(family[n]), "parameters": {"weight": 1}} for n in "ab"]}
    file = ties_file(tmp_path / "merge.yaml", family, **change)
    if message is None:
        merge(file)
        return
    with pytest.raises(UsageError, match=message):
        merge(file)


def test_models_that_do_not_fit_are_refused_by_tensor_and_model(family: Family, tmp_path: Path) -> None:
    from helpers.tiny import write_tiny_model

    wide = write_tiny_model(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(MergeError, match=r"shapes of `model.layers.0.mlp.down_proj.weight` differ"):
        merge(linear((family["a"], 1), (wide, 1)))
    biased = write_tiny_model(tmp_path / "biased", attention_bias=True)
    with pytest.raises(MergeError, match=r"has no tensor `.*bias`, which"):
        merge(linear((family["a"], 1), (biased, 1)))
    more_words = write_tiny_model(tmp_path / "words", vocab_size=320)
    with pytest.raises(MergeError, match="vocabularies differ"):
        merge(linear((family["a"], 1), (more_words, 1)))
    cut = merge(linear((more_words, 1), (family["a"], 1)), truncate_embeddings=True)
    assert cut["lm_head.weight"].shape == (300, 48) and cut.config["vocab_size"] == 300
    with pytest.raises(ConfigError, match="beyond the 4 layers"):
        merge({"merge_method": "passthrough", "slices": [{"sources": [{"model": str(wide), "layer_range": [0, 9]}]}]})


def test_nan_in_an_input_is_an_error_that_names_model_and_tensor(family: Family, tmp_path: Path) -> None:
    broken = fine_tune(family["base"], tmp_path / "broken", 9, spread=float("nan"))
    merged = merge(linear((family["a"], 1), (broken, 1)))
    with pytest.raises(MergeError, match=r"of .*broken holds NaN"):
        merged["model.norm.weight"]
    loose = merge(linear((family["a"], 1), (broken, 1)), allow_nonfinite=True)
    assert bool(loose["model.norm.weight"].isnan().all())


def test_dtype_rounds_inputs_and_out_dtype_only_what_is_stored(family: Family) -> None:
    content = linear((family["a"], 1), (family["b"], 1))
    full = merge(content)["model.norm.weight"]
    stored = merge(content | {"out_dtype": "bfloat16"})
    assert torch.equal(stored["model.norm.weight"], full.bfloat16())
    assert stored.config["torch_dtype"] == "bfloat16"
    rounded = merge(content | {"dtype": "bfloat16", "out_dtype": "float32"})["model.norm.weight"]
    a, b = (load_file(family[n] / "model.safetensors")["model.norm.weight"].bfloat16().float() for n in "ab")
    assert torch.equal(rounded, (a * 1 + b) / 2)


def test_a_parameter_without_effect_is_told(family: Family) -> None:
    merged = open_merge(linear((family["a"], 1), parameters={"density": 0.5, "int8_mask": True}))
    assert merged.plan.warnings[:1] == ("`density` has no effect with merge_method `linear`.",)


def test_the_command_merges_plans_and_lists(family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    assert run(["merge", "plan", str(file), "--json"]) == 0
    assert '"tensors": 39' in capsys.readouterr().out
    assert run(["merge", str(file), str(tmp_path / "short")]) == 0
    assert run(["merge", "run", str(file), str(tmp_path / "long"), "--json", "-j", "1"]) == 0
    assert '"identity"' in capsys.readouterr().out
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("short", "long"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert run(["merge", "methods"]) == 0
    assert "karcher" in capsys.readouterr().out
    assert run(["merge", str(file), str(tmp_path / "short"), "--max-memory", "10MB"]) == 2
    assert "Allow at least" in capsys.readouterr().err


@pytest.mark.parametrize("threads", [1, 3])
def test_the_papers_trim_keeps_the_greatest_of_the_whole_model(family: Family, threads: int) -> None:
    entries = [{"model": str(family["a"]), "parameters": {"weight": 1.0, "density": 0.2}}]
    content = {"merge_method": "ties", "base_model": str(family["base"]), "models": entries}
    merged = merge(content | {"parameters": {"trim_scope": "model"}}, threads=threads)
    base, tuned = (load_file(family[name] / "model.safetensors") for name in ("base", "a"))
    deltas = torch.cat([(tuned[name] - base[name]).reshape(-1) for name in sorted(base)])
    kept = deltas.abs().argsort(descending=True, stable=True)[: int(0.2 * len(deltas))]
    wanted = torch.zeros_like(deltas)
    wanted[kept] = deltas[kept]
    got = torch.cat([(merged[name] - base[name]).reshape(-1) for name in sorted(base)])
    assert torch.allclose(got, wanted, atol=1e-6) and int((got != 0).sum()) <= len(kept)
    per_tensor = merge(content)
    assert any(not torch.equal(per_tensor[name], merged[name]) for name in base)
    with pytest.raises(UsageError, match="trim_scope"):
        merge(content | {"parameters": {"trim_scope": "layer"}})


def test_a_model_of_seventy_billion_is_planned_from_its_config_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 8192,
        "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-5, "hidden_act": "silu",
        "max_position_embeddings": 8192,
    }  # fmt: skip
    for name in ("base", "one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    models = [{"model": f"./{name}", "parameters": {"weight": 1, "density": 0.5}} for name in ("one", "two")]
    content = {"merge_method": "ties", "base_model": "./base", "models": models}
    file = write(tmp_path / "big.yaml", content)
    assert run(["merge", "plan", str(file), "--json", "--max-memory", "4GB"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["tensors"] == 723 and found["bytes_written"] == 141_107_412_992
    assert found["bytes_read"] == 3 * found["bytes_written"] and found["peak_memory"] < 4e9
    with pytest.raises(MergeError, match=r"needs \d+ MB .* more than the 600 MB"):
        forecast(open_merge(file, MergeRun(bare=True)), max_memory="600MB")


def test_the_time_of_a_merge_is_told_from_a_measured_sample_of_its_method(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged = open_merge(linear((family["a"], 1), (family["b"], 1)))
    one, four = (forecasting._seconds_per_element(merged, threads) for threads in (1, 4))
    assert one is not None and four is not None and min(one, four) > 0
    monkeypatch.setattr(forecasting, "_seconds_per_element", lambda *_: 1e-3)
    found = forecast(merged)
    elements = sum(torch.Size(merged.info(name).shape).numel() for name in merged)
    assert found.seconds == pytest.approx(elements * 1e-3, abs=0.1)


def test_a_merged_model_answers_like_any_other(family: Family, tiny: Model) -> None:
    content = linear((family["base"], 1))
    merged = merge(content)
    base = load_file(family["base"] / "model.safetensors")
    assert all(torch.equal(merged[name], base[name]) for name in base)
    assert merged.tokenizer().encode("abc") == tiny.tokenizer.encode("abc")
