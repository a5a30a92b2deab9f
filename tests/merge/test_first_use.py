"""What a first user types by mistake, or brings along from mergekit: one clear sentence, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from gnomon.cli.main import run
from gnomon.merge.build import open_merge
from gnomon.merge.check import strangers
from gnomon.models import cache
from gnomon.models.patch import Patch
from gnomon.models.reference import open_path

from .conftest import fine_tune, ties_file

Family = dict[str, Path]


def told(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """(exit code, what stands on standard error)."""
    code = run(arguments)
    return code, capsys.readouterr().err


def linear(path: Path, *models: Path, **more: Any) -> Path:
    entries = [{"model": str(model), "parameters": {"weight": 1}} for model in models]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": entries} | more))
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"merge\.yaml is empty\. A merge file begins with"),
        ("only text", r"a merge is a mapping of keys, not text\. It begins with `merge_method:`"),
        ("a: [\n", r"not valid YAML: .* in line 2, column 1\.$"),
        ("merge_method: liner\nmodels: [{model: x}]", r"merge\.yaml: Unknown merge method `liner`\. .*`linear`"),
        ("merge_method: linear\nmodels: [{model: ./gone}]", r"there is no model `\./gone`\. Looked in /"),
        ("merge_method: linear\nmodels: [{model: org/name}]", r"written hf:org/name"),
        ("base_model: x\nexperts: []", r"describes a mixture of experts\. That is `gnomon merge moe FILE OUT`"),
        (
            "merge_method: linear\nmodels: [{model: x}]\nchat_template: chatmll",
            r"merge\.yaml: `chat_t.*Did you mean `chatml`",
        ),
    ],
)
def test_a_file_at_fault_is_told_in_one_sentence(
    tmp_path: Path, content: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "merge.yaml"
    file.write_text(content)
    code, error = told(["merge", str(file), str(tmp_path / "out")], capsys)
    assert code == 2 and re.search(message, error.strip()) and error.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["merge.yaml"]


def test_a_share_at_fault_names_the_model_that_has_it(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    content = yaml.safe_load(file.read_text())
    content["models"][1]["parameters"]["density"] = 1.5
    file.write_text(yaml.safe_dump(content))
    code, error = told(["merge", str(file), str(tmp_path / "out")], capsys)
    assert code == 2 and f"of {family['b']}: `density` must lie between 0 and 1, not 1.5" in error
    del content["base_model"]
    file.write_text(yaml.safe_dump(content))
    code, error = told(["merge", str(file), str(tmp_path / "out")], capsys)
    assert code == 2 and f"{file}: `ties` needs a base model. Set `base_model`." in error


def test_models_of_different_bases_are_told_without_a_base_too(family: Family, tmp_path: Path) -> None:
    far = fine_tune(family["base"], tmp_path / "far", 6, spread=2.0)
    file = linear(tmp_path / "merge.yaml", family["a"], far, family["b"])
    (warning,) = strangers(open_merge(file))
    assert re.search(rf"{far} lies \d+\.\d\d of {family['a']}'s norm away from it: the two hardly share", warning)
    assert strangers(open_merge(linear(file, family["a"], family["b"]))) == []


def test_sizes_threads_and_misspelt_commands_are_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = linear(tmp_path / "merge.yaml", family["a"], family["b"]), tmp_path / "out"
    assert told(["merge", str(file), str(out), "--out-shard-size", "0"], capsys)[0] == 2
    assert told(["merge", str(file), str(out), "--threads", "-4"], capsys)[0] == 2
    code, error = told(["merge", "runn", str(file), str(out)], capsys)
    assert code == 2 and "No such command 'runn'" in error and not out.exists()


def test_mergekit_yamls_other_flags_are_taken_and_told(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = linear(tmp_path / "merge.yaml", family["a"], family["b"]), tmp_path / "out"
    flags = ["--lazy-unpickle", "--allow-crimes", "--no-write-model-card", "--copy-tokenizer", "--device", "auto"]
    code, error = told(["merge", str(file), str(out), *flags, "--lora-merge-cache=x", "--num-threads", "2"], capsys)
    notes = [line for line in error.splitlines() if line.startswith("note: mergekit's --")]
    assert code == 0 and len(notes) == 5 and (out / "tokenizer.json").exists()
    assert told(["merge", str(file), str(out), "--lazy-pickle"], capsys)[0] == 2  # an unknown one is none of them


def test_a_raw_merge_does_not_replace_another_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"w": torch.ones(2, 2)}, tmp_path / "one.safetensors")
    file, out = linear(tmp_path / "raw.yaml", tmp_path / "one.safetensors"), tmp_path / "out.safetensors"
    out.write_text("precious")
    code, error = told(["merge", "raw", str(file), str(out)], capsys)
    assert code == 2 and "already exists and is not this merge" in error and out.read_text() == "precious"
    assert run(["merge", "raw", str(file), str(out), "--overwrite"]) == 0
    assert run(["merge", "raw", str(file), str(out)]) == 0  # its own result it makes again


def test_ctrl_c_stops_at_once_and_says_how_to_go_on(family: Family, tmp_path: Path) -> None:
    file, out = ties_file(tmp_path / "merge.yaml", family), tmp_path / "out"
    slow = (
        "import signal, sys, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from gnomon.merge.merged import MergedCheckpoint as M\ncompute = M.compute\n"
        "M.compute = lambda *a: (time.sleep(0.05), compute(*a))[1]\n"
        f"from gnomon.cli.main import main\nmain(['merge', {str(file)!r}, {str(out)!r}])"
    )
    process = subprocess.Popen([sys.executable, "-c", slow], stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    journal = tmp_path / "out.partial" / "journal.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 2):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    error = process.communicate(timeout=30)[1]
    assert process.returncode == 130 and "goes on from there" in error and "Traceback" not in error
    assert journal.exists() and not out.exists()


def test_a_file_made_whole_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("x")
    with cache.atomic_write(tmp_path / "whole") as out:
        out.write(b"x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_names_the_file_and_leaves_no_folder(tmp_path: Path) -> None:
    target = tmp_path / "new" / "file.bin"
    with pytest.raises(OSError, match="disk is full") as raised, cache.atomic_write(target):
        raise OSError(28, "No space left on device")
    assert raised.value.filename == str(target) and not list(tmp_path.iterdir())


def test_what_stands_beside_the_numbers_is_part_of_what_is_finished(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = linear(tmp_path / "merge.yaml", family["a"], family["b"]), tmp_path / "out"
    assert run(["merge", str(file), str(out)]) == 0 == run(["merge", str(file), str(out)])
    assert told(["merge", str(file), str(out), "--out-shard-size", "100k"], capsys)[0] == 2
    linear(file, family["a"], family["b"], chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    code, error = told(["merge", str(file), str(out)], capsys)
    assert code == 2 and "is not this merge" in error
    assert run(["merge", str(file), str(out), "--overwrite"]) == 0
    assert (out / "chat_template.jinja").read_text().startswith("{% for m in messages %}{{ m.content")


def test_a_file_of_several_documents_is_checked_as_its_result(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = linear(tmp_path / "a.yaml", family["a"], family["b"], name="ab").read_text()
    second = linear(tmp_path / "b.yaml", Path("ab"), family["c"]).read_text()
    (tmp_path / "merge.yaml").write_text(f"{first}---\n{second}")
    assert run(["merge", "check", str(tmp_path / "merge.yaml"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and list(found["cosines"]) == [f"ab {family['c']}"]


def test_a_token_that_a_rule_takes_from_a_row_that_is_not_there_is_refused(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rule = {"source": {"kind": "model_token", "model": str(family["a"]), "token_id": 9999}}
    more = {"base_model": str(family["base"]), "tokenizer": {"source": "base", "tokens": {"<|new|>": rule}}}
    file = linear(tmp_path / "merge.yaml", family["a"], family["b"], **more)
    code, error = told(["merge", str(file), str(tmp_path / "out")], capsys)
    assert code == 2 and "has 300 tokens, no token_id 9999 (in tokenizer.tokens.<|new|>)" in error


def test_what_a_long_search_would_fail_on_at_its_end_is_told_before_it(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, empty = linear(tmp_path / "merge.yaml", family["a"], family["b"]), tmp_path / "empty.txt"
    empty.write_text(" \n")
    command = ["merge", "sweep", str(file), "--sweep", "weight=0,1", "--text"]
    code, error = told([*command, str(empty)], capsys)
    assert code == 2 and f"The text {empty} is empty." in error
    code, error = told([*command, str(tmp_path / "gone.txt")], capsys)
    assert code == 2 and "gone.txt cannot be read: No such file or directory." in error
    code, error = told([*command, str(file), "--plot", str(tmp_path / "curve.xyz")], capsys)
    assert code == 2 and "is of no known kind. Name a .png, .svg or .pdf file." in error


def test_a_patch_can_be_made_for_a_merge_file(family: Family, tmp_path: Path) -> None:
    file, out = linear(tmp_path / "merge.yaml", family["a"], family["b"]), tmp_path / "p.patch.safetensors"
    assert run(["patch", "create", str(file), str(family["c"]), "-o", str(out), "--only", "up_proj"]) == 0
    patch, merged = Patch.load(out), open_merge(file)
    name = "model.layers.2.mlp.up_proj.weight"
    assert patch.base == merged.identity and len(patch.deltas) == 4
    assert torch.allclose(patch.apply(merged)[name], open_path(family["c"])[name], atol=1e-6)
