"""Patches made from checkpoints and adapters, merged, written into directories and taken out again; the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gnomon.cli.main import run
from gnomon.errors import CheckpointError, PatchError, WrongBase
from gnomon.models.cache import atomic_write
from gnomon.models.patch import Dense, LowRank, Patch, Sparse
from gnomon.models.patch.difference import difference
from gnomon.models.patch.merging import merge_patches, ties, trim
from gnomon.models.patch.peft import from_peft, to_peft
from gnomon.models.patch.written import apply_to_directory, revert_directory
from gnomon.models.reference import open_checkpoint
from helpers.patches import random_patch
from helpers.tiny import write_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_tiny_model(tmp_path / "base")


def tuned_copy(folder: Path, change, dtype: torch.dtype = torch.float32) -> Path:
    out = folder.with_name("tuned")
    shutil.copytree(folder, out)
    tensors = {name: t.to(dtype) for name, t in load_file(folder / "model.safetensors").items()}
    if dtype is not torch.float32:
        save_file(tensors, folder / "model.safetensors")
    save_file(change(tensors), out / "model.safetensors")
    return out


def nudge(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    out = {name: t.clone() for name, t in tensors.items()}
    for name in out:
        if "layers.1" in name:
            out[name] += (torch.randn(out[name].shape, generator=g) * 0.05).to(out[name].dtype)
    flat = out["model.layers.2.mlp.up_proj.weight"].view(-1)
    flat[7] += 1.0
    return out


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_task_vector_gives_the_tuned_model_back_bit_for_bit(folder: Path, dtype: torch.dtype) -> None:
    tuned = tuned_copy(folder, nudge, dtype)
    base, target = open_checkpoint(folder), open_checkpoint(tuned)
    patch = difference(base, target)
    assert patch.report["not_exact"] == []
    seen = patch.apply(base)
    for name in base:
        assert torch.equal(seen[name], target[name])
    assert isinstance(patch.deltas["model.layers.2.mlp.up_proj.weight"], Sparse)
    assert isinstance(patch.deltas[DOWN], Dense)
    assert all("layers.1" in name or "layers.2" in name for name in patch.deltas)


def test_in_float32_the_report_names_what_rounding_moves(folder: Path) -> None:
    base, target = open_checkpoint(folder), open_checkpoint(tuned_copy(folder, nudge))
    patch = difference(base, target)
    seen = patch.apply(base)
    moved = [name for name in base if not torch.equal(seen[name], target[name])]
    assert moved == patch.report["not_exact"]
    assert all(torch.allclose(seen[name], target[name], rtol=1e-6, atol=1e-7) for name in base)


def test_a_low_rank_task_vector_names_the_vectors_it_leaves_out(folder: Path) -> None:
    base, target = open_checkpoint(folder), open_checkpoint(tuned_copy(folder, nudge))
    patch = difference(base, target, rank=4)
    assert patch.is_low_rank and patch.rank == 4
    assert all("norm" in name for name in patch.report["left_out"]) and len(patch.report["left_out"]) == 2
    whole = difference(base, target, only=["down_proj"]).to_low_rank(4)
    assert torch.allclose(patch.dense(DOWN), whole.dense(DOWN), atol=1e-5)


def test_checkpoints_that_cannot_be_compared_are_refused_by_tensor(folder: Path, tmp_path: Path) -> None:
    base = open_checkpoint(folder)
    with pytest.raises(PatchError, match="changes no tensor"):
        difference(base, open_checkpoint(folder))
    other = open_checkpoint(write_tiny_model(tmp_path / "o", intermediate_size=64))
    with pytest.raises(PatchError, match=r"\(80, 48\).*\(64, 48\)"):
        difference(base, other, only=["gate_proj"])
    deeper = open_checkpoint(write_tiny_model(tmp_path / "d", num_hidden_layers=5))
    with pytest.raises(PatchError, match="adds no tensor"):
        difference(base, deeper)
    with pytest.raises(PatchError, match="lacks the tensor"):
        difference(deeper, base)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 99), st.sampled_from([8, 16, 3]), st.booleans())
def test_an_adapter_becomes_a_patch_and_an_adapter_again(
    tmp_path_factory: pytest.TempPathFactory, rank: int, seed: int, alpha: int, rslora: bool
) -> None:
    tmp_path = tmp_path_factory.mktemp("a")
    base = open_checkpoint(write_tiny_model(tmp_path / "m"))
    g = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in {"self_attn.q_proj": (64, 48), "mlp.down_proj": (48, 80)}.items():
        at = f"base_model.model.model.layers.0.{module}"
        tensors[f"{at}.lora_A.weight"] = torch.randn(rank, columns, generator=g)
        tensors[f"{at}.lora_B.weight"] = torch.randn(rows, rank, generator=g)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "use_rslora": rslora}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    patch = from_peft(adapter, base)
    overlay = open_checkpoint(f"{tmp_path / 'm'}+{adapter}")
    for name in patch.deltas:
        assert torch.allclose(patch.apply(base)[name], overlay[name], rtol=1e-5, atol=1e-5)
    again = from_peft(to_peft(patch, tmp_path / "again"), base)
    assert again == patch  # exported with scale 1: bit for bit


def test_peft_itself_computes_what_the_patch_says(folder: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    transformers = pytest.importorskip("transformers")
    base = open_checkpoint(folder)
    patch = random_patch(base, 1).only("_proj")
    for name in patch.deltas:
        assert isinstance(patch.deltas[name], LowRank)
    exported = to_peft(patch, tmp_path / "adapter")
    ids = torch.tensor([[5, 9, 17, 250, 33]])
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        theirs = peft.PeftModel.from_pretrained(model, exported)(ids).logits
        inside = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for name, parameter in inside.named_parameters():
            if name in patch.deltas:
                parameter += patch.dense(name)
        assert torch.allclose(theirs, inside(ids).logits, atol=1e-4)


def test_what_no_adapter_can_hold_is_not_exported(folder: Path, tmp_path: Path) -> None:
    base = open_checkpoint(folder)
    with pytest.raises(PatchError, match="embed_tokens"):
        to_peft(random_patch(base, 1), tmp_path / "x")
    with pytest.raises(PatchError, match="dense"):
        to_peft(Patch({DOWN: Dense(torch.ones(48, 80))}, base.identity), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "f").touch()
    with pytest.raises(PatchError, match="not empty"):
        to_peft(random_patch(base, 1).only("_proj"), tmp_path / "full")


def test_ties_by_hand() -> None:
    """Worked by hand from arXiv 2306.01708, section 4: trim to the largest half, elect, average those that agree."""
    a, b = torch.tensor([4.0, -1.0, 3.0, 0.5]), torch.tensor([2.0, -5.0, -4.0, 0.1])
    # trimmed: [4, 0, 3, 0] and [0, -5, -4, 0]; elected signs: + - - 0
    assert ties([a, b], weights=[1.0, 1.0], density=0.5).tolist() == [4.0, -5.0, -4.0, 0.0]
    assert ties([a, b], weights=[2.0, 1.0], density=0.5).tolist() == [4.0, -5.0, 3.0, 0.0]
    assert ties([a, a], weights=[1.0, 1.0], density=1.0).tolist() == a.tolist()
    assert ties([a, a], weights=[1.0, 1.0], density=1.0, normalize=False).tolist() == (2 * a).tolist()
    assert trim(torch.tensor([1.0, 1.0, 1.0, 1.0]), 0.5).tolist() == [1.0, 1.0, 0.0, 0.0]


def test_merging_patches() -> None:
    a, b = (Patch({DOWN: LowRank(torch.full((4, 1), x), torch.ones(1, 5))}, "b") for x in (1.0, 3.0))
    assert merge_patches([a, b]).is_low_rank
    assert merge_patches([a, b], weights=[1, 2]).dense(DOWN)[0, 0] == 7.0
    assert merge_patches([a, b], method="mean").dense(DOWN)[0, 0] == 2.0
    assert merge_patches([a, b], method="mean", weights=[3, 1]).dense(DOWN)[0, 0] == 1.5
    assert merge_patches([a, b], method="ties", density=1.0).dense(DOWN)[0, 0] == 2.0
    apart = Patch({"other": Dense(torch.ones(2))}, "b")
    joined = merge_patches([a, apart], method="ties", density=1.0)
    assert joined.dense("other").tolist() == [1.0, 1.0] and joined.dense(DOWN)[0, 0] == 1.0
    for wrong in (
        {"method": "slurp"},
        {"weights": [1.0]},
        {"density": 0.0, "method": "ties"},
        {"weights": [1.0, -1.0], "method": "mean"},
    ):
        with pytest.raises(PatchError):
            merge_patches([a, b], **wrong)  # type: ignore[arg-type]
    with pytest.raises(PatchError, match="different bases"):
        merge_patches([a, Patch(b.deltas, "c")], method="ties")


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("shards", [1, 3])
def test_a_written_patch_reverts_to_the_same_bytes_in_any_number_of_steps(tmp_path: Path, shards: int) -> None:
    folder = write_tiny_model(tmp_path / "m", shards=shards)
    original, first = bytes_of(folder), open_checkpoint(folder)
    identity = first.identity
    a = random_patch(first, 1)
    expected = {name: a.apply(first)[name].clone() for name in first}
    apply_to_directory(a, folder)
    written = open_checkpoint(folder)
    assert all(torch.equal(written[name], expected[name]) for name in expected)
    b = random_patch(written, 2)
    middle = bytes_of(folder)
    apply_to_directory(b, folder)
    assert bytes_of(folder) != middle
    revert_directory(folder)
    assert bytes_of(folder) == middle
    assert revert_directory(folder) == identity
    assert bytes_of(folder) == original
    with pytest.raises(PatchError, match="no undo file"):
        revert_directory(folder)


def test_applying_to_a_copy_leaves_the_original_alone(folder: Path, tmp_path: Path) -> None:
    original, base = bytes_of(folder), open_checkpoint(folder)
    patch = random_patch(base, 1)
    undo = apply_to_directory(patch, folder, tmp_path / "out")
    assert undo.exists() and bytes_of(folder) == original
    assert torch.equal(open_checkpoint(tmp_path / "out")[DOWN], patch.apply(base)[DOWN])
    revert_directory(tmp_path / "out")
    assert bytes_of(tmp_path / "out") == original
    with pytest.raises(PatchError, match="exists already"):
        apply_to_directory(patch, folder, tmp_path / "out")


def test_a_wrong_base_writes_nothing(folder: Path, tmp_path: Path) -> None:
    patch = random_patch(open_checkpoint(write_tiny_model(tmp_path / "o", seed=3)), 1)
    for out in (None, tmp_path / "out"):
        with pytest.raises(WrongBase):
            apply_to_directory(patch, folder, out)
    assert not (folder / "undo").exists() and not (tmp_path / "out").exists()
    apply_to_directory(patch, folder, any_base=True)
    revert_directory(folder)


def test_a_later_change_of_a_patched_weight_is_not_reverted_away(folder: Path) -> None:
    apply_to_directory(random_patch(open_checkpoint(folder), 1), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors[DOWN] = tensors[DOWN] + 1
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(PatchError, match="changed after the patch"):
        revert_directory(folder)


def test_a_failure_at_any_write_leaves_what_revert_restores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_tiny_model(tmp_path / "m", shards=3)
    original = bytes_of(folder)
    patch = random_patch(open_checkpoint(folder), 1)
    module = "gnomon.models.patch.written.atomic_write"
    for last in range(4):  # the undo file, then three weight files
        with monkeypatch.context() as m:
            count = iter(range(10))

            def fails(path: Path, count=count, last=last):
                if next(count) == last:
                    raise OSError(28, "No space left on device", str(path))
                return atomic_write(path)

            m.setattr(module, fails)
            with pytest.raises(OSError, match="No space left"):
                apply_to_directory(patch, folder)
        assert (bytes_of(folder) != original) == (last > 1)
        if last > 0:
            revert_directory(folder)
        assert bytes_of(folder) == original and not (folder / "undo").exists()


def test_a_process_killed_while_applying_leaves_what_revert_restores(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", shards=4)
    original = bytes_of(folder)
    patch = random_patch(open_checkpoint(folder), 1)
    file = patch.save(tmp_path / "p.patch.safetensors")
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from gnomon.models.patch import Patch\n"
        "from gnomon.models.patch.written import apply_to_directory, revert_directory\n"
        "patch, folder = Patch.load(sys.argv[1]), Path(sys.argv[2])\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    apply_to_directory(patch, folder)\n"
        "    revert_directory(folder)\n"
    )
    for delay in (0.005, 0.02, 0.035):
        worker = subprocess.Popen([sys.executable, "-c", code, str(file), str(folder)], stdout=subprocess.PIPE)
        assert worker.stdout is not None
        worker.stdout.readline()
        time.sleep(delay)
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
        while (folder / "undo").exists() and any((folder / "undo").glob("*.safetensors")):
            revert_directory(folder)
        names = set(original)
        assert {name: data for name, data in bytes_of(folder).items() if name in names} == original


def test_the_command_from_two_models_to_a_reverted_directory(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tuned = tuned_copy(folder, nudge)
    one, two, three = (str(tmp_path / f"{name}.patch.safetensors") for name in ("one", "two", "three"))

    def ok(*arguments: str) -> str:
        assert run(["patch", *arguments]) == 0, capsys.readouterr().err
        return capsys.readouterr().out

    assert "rank 8" in ok("create", str(folder), str(tuned), "-o", one, "--rank", "8")
    facts = json.loads(ok("show", one, "--json"))
    assert facts["rank"] == 8 and facts["runs_beside"] and facts["base"] == open_checkpoint(folder).identity
    assert "q_proj" in ok("show", one, "--tensors")
    ok("negate", one, "-o", two)
    compared = json.loads(ok("diff", one, two, "--json"))
    assert compared["tensors"][0]["cosine"] == pytest.approx(-1.0) and not compared["identical"]
    assert "identical" in ok("diff", one, one)
    ok("merge", one, one, "-o", three, "--method", "mean")
    ok("compress", three, "-o", three, "--rank", "2")
    original = bytes_of(folder)
    assert json.loads(ok("apply", str(folder), one, "--json"))["identity"] != facts["base"]
    assert json.loads(ok("revert", str(folder), "--json"))["identity"] == facts["base"]
    assert bytes_of(folder) == original
    ok("export", one, str(tmp_path / "adapter"))
    ok("create", str(folder), str(tmp_path / "adapter"), "-o", two)
    assert json.loads(ok("diff", one, two, "--json"))["identical"]
    for arguments, words in (
        (["create", str(folder), str(tuned), "-o", one, "--rank", "2", "--energy", "0.5"], "either --rank or"),
        (["show", str(tmp_path / "no")], "cannot be read"),
        (["apply", str(tmp_path / "m.gguf"), one], "no model directory"),
        (["merge", one, "-o", two], "at least two"),
    ):
        assert run(["patch", *arguments]) == 2
        assert words in capsys.readouterr().err


def test_an_adapter_of_another_network_is_refused_by_tensor(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    save_file({"base_model.model.x.lora_A.weight": torch.ones(1, 1)}, tmp_path / "a" / "adapter_model.safetensors")
    (tmp_path / "a" / "adapter_config.json").write_text('{"r": 1, "lora_alpha": 1}')
    with pytest.raises(CheckpointError, match="fits nothing"):
        from_peft(tmp_path / "a", open_checkpoint(folder))
