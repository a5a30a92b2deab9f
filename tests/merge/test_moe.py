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


def test_what_a_mixture_cannot_be_is_said_by_name(family: Family, tmp_path: Path) -> None:
    file = tmp_path / "moe.yaml"
    with pytest.raises(ConfigError, match=r"experts_per_token is 3, and there are 2 experts"):
        parse_moe(moe_file(file, family, experts_per_token=3))
    with pytest.raises(ConfigError, match=r"`shared_experts` is not supported: Mixtral has none|no shared experts"):
        parse_moe(moe_file(file, family, shared_experts=[{"source_model": "x"}]))
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
    content["experts"][1]["noise_scale"] = 0.1
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match="`noise_scale` is not supported"):
        parse_moe(file)
