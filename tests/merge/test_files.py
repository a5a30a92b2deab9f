"""Bare tensor files, and a difference of models as a LoRA adapter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from gnomon.cli.main import run
from gnomon.errors import CheckpointError, MergeError, PatchError
from gnomon.merge import method
from gnomon.merge.extract import extract_lora
from gnomon.merge.raw import merge_raw
from gnomon.models.reference import open_checkpoint, open_path
from helpers.tiny import write_tiny_model

Family = dict[str, Path]


def test_tensor_files_merge_into_one_file(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    files = [{"w": torch.randn(5, 4, generator=generator), "step": torch.tensor([3])} for _ in range(3)]
    save_file(files[0], tmp_path / "base.safetensors")
    save_file(files[1], tmp_path / "one.safetensors")
    torch.save(files[2], tmp_path / "two.pt")
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("one.safetensors", "two.pt")]
    content = {"merge_method": "task_arithmetic", "base_model": "base.safetensors", "models": models}
    file = tmp_path / "raw.yaml"
    file.write_text(yaml.safe_dump(content))
    assert run(["merge", "raw", str(file), str(tmp_path / "out.safetensors")]) == 0
    merged = load_file(tmp_path / "out.safetensors")
    wanted = method("task_arithmetic")([files[1]["w"], files[2]["w"]], base=files[0]["w"], weight=0.5)
    assert torch.equal(merged["w"], wanted) and torch.equal(merged["step"], files[0]["step"])
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "base.safetensors", "one.safetensors", "out.safetensors", "raw.yaml", "two.pt",
    ]  # fmt: skip
    with pytest.raises(MergeError, match="no slices"):
        merge_raw(content | {"tokenizer_source": "base"})


class Mischief:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return eval, ("1",)


def test_a_pickle_that_asks_for_more_than_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"w": Mischief()}, tmp_path / "bad.pt")
    with pytest.raises(
        CheckpointError, match=r"bad\.pt asks for more than tensors \(eval\) and was not loaded\. A pickle"
    ):
        merge_raw({"merge_method": "passthrough", "models": [{"model": str(tmp_path / "bad.pt")}]})


def test_whole_numbers_that_differ_are_refused(tmp_path: Path) -> None:
    for step in (1, 2):
        save_file({"step": torch.tensor([step])}, tmp_path / f"{step}.safetensors")
    models = [{"model": str(tmp_path / f"{step}.safetensors"), "parameters": {"weight": 1}} for step in (1, 2)]
    with pytest.raises(MergeError, match="no floating-point tensor and differs"):
        merge_raw({"merge_method": "linear", "models": models})["step"]


def test_a_low_rank_difference_is_found_again_exactly(family: Family, tmp_path: Path) -> None:
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    for file in family["base"].iterdir():
        (tuned / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tuned / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    touched = [name for name in tensors if "mlp.up_proj" in name]
    for name in touched:
        rows, columns = tensors[name].shape
        tensors[name] += torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator) * 0.1
    tensors["model.norm.weight"] += 0.01
    save_file(tensors, tuned / "model.safetensors")
    found = extract_lora(open_path(family["base"]), open_path(tuned), tmp_path / "lora", max_rank=4)
    assert (found.modules, found.left_out) == (len(touched), ("model.norm.weight",)) and found.kept > 0.99
    overlaid = open_checkpoint(f"{family['base']}+{tmp_path / 'lora'}")
    for name in touched:
        assert torch.allclose(overlaid[name], tensors[name], atol=1e-5)
    assert run(["merge", "lora-extract", str(family["base"]), str(tuned), str(tmp_path / "again")]) == 0
    with pytest.raises(MergeError, match="No linear module differs"):
        extract_lora(open_path(family["base"]), open_path(family["base"]), tmp_path / "none")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--include", "("], r"--include: `\(` is no regular expression"),
        (["--max-rank", "0"], "--max-rank must be at least 1"),
        (["--energy", "1.5"], "--energy must lie between 0 and 1"),
        (["--include", "nothing_like_this"], "No linear module that --include and --exclude leave differs"),
    ],
)
def test_a_wrong_option_of_an_extraction_is_told_before_anything_is_made(
    family: Family, tmp_path: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lora"
    assert run(["merge", "lora-extract", str(family["base"]), str(family["a"]), str(out), *flags]) == 2
    assert re.search(message, capsys.readouterr().err) and not out.exists()


def test_an_extraction_lists_what_it_leaves_out_and_refuses_another_network(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "lora-extract", str(family["base"])]
    assert run([*command, str(family["a"]), str(tmp_path / "lora"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["modules"] == 28 and "model.norm.weight" in found["left_out"] and len(found["left_out"]) == 11
    deeper = write_tiny_model(tmp_path / "deeper", num_hidden_layers=6)
    assert run([*command, str(deeper), str(tmp_path / "none")]) == 2
    assert "has no tensor `model.layers.4." in capsys.readouterr().err
    with pytest.raises(PatchError, match="not empty"):
        extract_lora(open_path(family["base"]), open_path(family["a"]), tmp_path / "lora")
