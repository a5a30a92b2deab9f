"""Mixtures of experts: where every tensor comes from, what the router's rows are, and that transformers runs it."""

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
from gnomon.errors import ConfigError
from gnomon.merge.moe import open_moe, parse_moe
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

Family = dict[str, Path]
PROMPTS = [["the and in", "ou there"], ["in an ou", "an"]]


def moe_file(path: Path, family: Family, **more: Any) -> Path:
    experts = [
        {"source_model": str(family[name]), "positive_prompts": prompts}
        for name, prompts in zip("ab", PROMPTS, strict=True)
    ]
    path.write_text(yaml.safe_dump({"base_model": str(family["base"]), "experts": experts} | more))
    return path


def test_every_tensor_of_a_mixture_comes_from_where_it_should(family: Family, tmp_path: Path) -> None:
    file = moe_file(tmp_path / "moe.yaml", family, gate_mode="random")
    content = yaml.safe_load(file.read_text())
    content["experts"][1]["residual_scale"] = 0.5
    file.write_text(yaml.safe_dump(content))
    assert run(["merge", "moe", str(file), str(tmp_path / "out"), "--seed", "3"]) == 0
    made = load_file(tmp_path / "out" / "model.safetensors")
    parts = {name: load_file(family[name] / "model.safetensors") for name in ("base", "a", "b")}
    wanted = {name: tensor for name, tensor in parts["base"].items() if ".mlp." not in name}
    for layer in range(4):
        for number, expert in enumerate("ab"):
            for own, part in (("gate_proj", "w1"), ("down_proj", "w2"), ("up_proj", "w3")):
                tensor = parts[expert][f"model.layers.{layer}.mlp.{own}.weight"]
                scale = 0.5 if (number, own) == (1, "down_proj") else 1.0
                wanted[f"model.layers.{layer}.block_sparse_moe.experts.{number}.{part}.weight"] = tensor * scale
    router = torch.randn(4, 2, 48, generator=torch.Generator().manual_seed(3))
    wanted |= {f"model.layers.{i}.block_sparse_moe.gate.weight": router[i] for i in range(4)}
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"]) == (2, 2)
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_a_mixture_of_one_model_with_itself_is_that_model_in_transformers(family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    same = {"base": family["a"], "a": family["a"], "b": family["a"]}
    assert run(["merge", "moe", str(moe_file(tmp_path / "moe.yaml", same)), str(tmp_path / "out")]) == 0
    ids = torch.tensor([[1, 5, 9, 33, 7]])
    with torch.no_grad():
        mixture = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids=ids).logits
        dense = transformers.AutoModelForCausalLM.from_pretrained(family["a"])(input_ids=ids).logits
    assert type(mixture) is torch.Tensor and torch.allclose(mixture, dense, atol=1e-4)
    with gnomon.load(tmp_path / "out", ledger=False) as ours, gnomon.load(family["a"], ledger=False) as plain:
        options = {"max_tokens": 8, "ignore_eos": True}
        assert ours.generate("the and", **options).token_ids == plain.generate("the and", **options).token_ids


@pytest.mark.parametrize("mode", ["cheap_embed", "hidden", "hidden_avg"])
def test_the_routers_rows_are_where_the_prompts_are(mode: str, family: Family, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    file = moe_file(tmp_path / "moe.yaml", family, gate_mode=mode)
    content = yaml.safe_load(file.read_text())
    content["experts"][0]["negative_prompts"] = ["there"]
    file.write_text(yaml.safe_dump(content))
    merged = open_moe(file)
    module = transformers.AutoModelForCausalLM.from_pretrained(family["base"])
    backend = open_checkpoint(family["base"]).tokenizer().backend

    def state(prompt: str, layer: int) -> torch.Tensor:
        ids = [0, *backend.encode(prompt, add_special_tokens=False).ids]
        if mode == "cheap_embed":
            return module.model.embed_tokens.weight[ids].sum(0)  # type: ignore[no-any-return]
        rows = module(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
        return rows[-1] if mode == "hidden" else rows.mean(0)  # type: ignore[no-any-return]

    def unit(row: torch.Tensor) -> torch.Tensor:
        return row / row.norm()

    with torch.no_grad():
        for layer in (0, 2, 3):
            positive = [sum(state(p, layer) for p in prompts) / len(prompts) for prompts in PROMPTS]
            negative = state("there", layer)
            first = unit(positive[0]) - unit(negative) if mode == "cheap_embed" else positive[0] - negative  # type: ignore[arg-type]
            rows = torch.stack([unit(first), unit(positive[1])])  # type: ignore[arg-type]
            got = merged[f"model.layers.{layer}.block_sparse_moe.gate.weight"]
            assert torch.allclose(got, rows, atol=2e-5), (mode, layer)


def only_mlps(model: Path, layer: int, part: str) -> torch.Tensor:
    return load_file(model / "model.safetensors")[f"model.layers.{layer}.mlp.{part}.weight"]


def test_a_shared_expert_without_prompts_makes_a_deepseek(family: Family, tmp_path: Path) -> None:
    file = moe_file(
        tmp_path / "moe.yaml", family, gate_mode="random", shared_experts=[{"source_model": str(family["c"])}]
    )
    merged = open_moe(file, seed=5)
    assert any("only as code of the hub" in warning for warning in merged.plan.warnings)
    for layer in range(4):
        for part in ("gate_proj", "up_proj", "down_proj"):
            home = f"model.layers.{layer}.mlp"
            assert torch.equal(merged[f"{home}.experts.1.{part}.weight"], only_mlps(family["b"], layer, part))
            assert torch.equal(merged[f"{home}.shared_experts.{part}.weight"], only_mlps(family["c"], layer, part))
    router = torch.randn(4, 2, 48, generator=torch.Generator().manual_seed(5))
    assert torch.equal(merged["model.layers.2.mlp.gate.weight"], router[2])
    wanted = {"model_type": "deepseek", "n_routed_experts": 2, "n_shared_experts": 1, "moe_intermediate_size": 80}
    assert wanted.items() <= merged.config.items() and merged.config["architectures"] == ["DeepseekForCausalLM"]


def logits(folder: Path) -> torch.Tensor:
    import transformers

    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder)
        return model(input_ids=torch.tensor([[1, 5, 9, 33, 7]])).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_gated_shared_expert_makes_a_qwen2_moe_that_transformers_runs(
    kind: str, family: Family, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    same = family["a"] if kind == "llama" else write_tiny_model(tmp_path / "qwen2", "qwen2")
    models = dict.fromkeys(("base", "a", "b"), same)
    shared = {"source_model": str(same), "positive_prompts": ["the and"], "residual_scale": 0.0}
    file = moe_file(tmp_path / "moe.yaml", models, shared_experts=[shared])
    assert run(["merge", "moe", str(file), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["Qwen2MoeForCausalLM"] and config["num_experts"] == 2
    # experts of one model, and a shared one whose output is 0: the model itself
    assert torch.allclose(logits(tmp_path / "out"), logits(same), atol=1e-4)
    made = load_file(tmp_path / "out" / "model.safetensors")
    assert made["model.layers.0.mlp.shared_expert_gate.weight"].shape == (1, 48)
    assert ("model.layers.3.self_attn.q_proj.bias" in made) and (kind == "qwen2" or not made[
        "model.layers.3.self_attn.q_proj.bias"].any())  # fmt: skip
    with gnomon.load(tmp_path / "out", ledger=False) as ours, gnomon.load(same, ledger=False) as plain:
        options = {"max_tokens": 6, "ignore_eos": True}
        assert ours.generate("the and", **options).token_ids == plain.generate("the and", **options).token_ids


def test_qwen3_models_make_a_qwen3_moe_that_transformers_runs(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = write_tiny_model(tmp_path / "qwen3", "qwen3")
    file = moe_file(tmp_path / "moe.yaml", dict.fromkeys(("base", "a", "b"), base))
    assert run(["merge", "moe", str(file), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["Qwen3MoeForCausalLM"]
    assert torch.allclose(logits(tmp_path / "out"), logits(base), atol=1e-4)


def test_noise_on_an_expert_has_the_deviation_asked_for_and_comes_from_the_seed(family: Family, tmp_path: Path) -> None:
    file = moe_file(tmp_path / "moe.yaml", dict.fromkeys(("base", "a", "b"), family["a"]), gate_mode="random")
    content = yaml.safe_load(file.read_text())
    for expert in content["experts"]:
        expert["noise_scale"] = 0.25
    file.write_text(yaml.safe_dump(content))
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    one, again, other = open_moe(file, seed=1), open_moe(file, seed=1, threads=1), open_moe(file, seed=2)
    noise = one[name.format(0)] - only_mlps(family["a"], 1, "gate_proj")
    assert abs(float(noise.mean())) < 0.02 and abs(float(noise.std()) - 0.25) < 0.01
    assert torch.equal(one[name.format(0)], again[name.format(0)]) and one.identity == again.identity
    assert not torch.equal(one[name.format(0)], one[name.format(1)])
    assert not torch.equal(one[name.format(0)], other[name.format(0)]) and one.identity != other.identity


def test_what_a_mixture_cannot_be_is_said_by_name(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "moe.yaml"
    with pytest.raises(ConfigError, match=r"experts_per_token is 3, and there are 2 experts"):
        parse_moe(moe_file(file, family, experts_per_token=3))
    shared = [{"source_model": str(family["a"])}]
    with pytest.raises(ConfigError, match=r"mixtral: it has no shared experts, not 1"):
        open_moe(moe_file(file, family, architecture="mixtral", shared_experts=shared))
    with pytest.raises(ConfigError, match=r"qwen: its shared expert is gated and needs positive_prompts"):
        open_moe(moe_file(file, family, architecture="qwen", shared_experts=shared))
    with pytest.raises(ConfigError, match=r"qwen3: it takes qwen3 models, not llama"):
        open_moe(moe_file(file, family, architecture="qwen3"))
    with pytest.raises(ConfigError, match=r"unknown architecture `mixtal`.*Did you mean `mixtral`"):
        open_moe(moe_file(file, family, architecture="mixtal"))
    with pytest.raises(ConfigError, match=r"no network of experts holds these.*mixtral: .*deepseek: .*qwen: .*qwen3: "):
        open_moe(moe_file(file, family, shared_experts=shared * 2))
    with pytest.raises(ConfigError, match=r"gate_mod.*Did you mean `gate_mode`"):
        parse_moe(moe_file(file, family, gate_mod="random"))
    content = yaml.safe_load(moe_file(file, family).read_text())
    content["experts"][1].pop("positive_prompts")
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=r"experts\[1\] has no positive_prompts"):
        parse_moe(file)
    content["experts"][1]["positive_prompts"] = content["experts"][0]["positive_prompts"]
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="same prompts"):
        parse_moe(file)
