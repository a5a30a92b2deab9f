"""Writing: bounded, resumable, whole or not at all, the same bytes however it came about."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import gnomon.merge.writer
from gnomon.cli.main import run
from gnomon.errors import MergeError
from gnomon.merge import merge
from gnomon.merge.build import MergeRun, open_merge
from gnomon.merge.writer import write
from gnomon.models.reference import open_path

from .conftest import fine_tune, ties_file

Family = dict[str, Path]


def content(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


def test_what_is_written_is_what_is_computed_and_names_its_origin(family: Family, tmp_path: Path) -> None:
    merged = open_merge(ties_file(tmp_path / "merge.yaml", family))
    written = write(merged, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == set(merged) and all(torch.equal(stored[name], merged[name]) for name in merged)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "gnomon_identity": merged.identity}
    record = json.loads((tmp_path / "out" / "gnomon_merge.json").read_text())
    assert record["identity"] == merged.identity == written.identity
    assert record["weights_identity"] == open_path(tmp_path / "out").identity
    sums = {name: digest for name, digest in content(tmp_path / "out").items() if name != "gnomon_merge.json"}
    assert record["files"] == sums
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.offline
def test_a_merge_needs_no_network_and_gives_the_same_bytes_without_one(family: Family, tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rn", "true"], capture_output=True).returncode:
        pytest.skip("this system does not allow `unshare -rn` (needs user namespaces)")
    file = ties_file(tmp_path / "merge.yaml", family)
    command = [sys.executable, "-m", "gnomon", "merge", str(file)]
    cut = subprocess.run(["unshare", "-rn", *command, str(tmp_path / "cut")], capture_output=True, text=True)
    assert cut.returncode == 0, cut.stderr
    write(open_merge(file), tmp_path / "joined")
    assert content(tmp_path / "cut") == content(tmp_path / "joined")


def test_threads_and_shards_do_not_change_a_number(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "dare.yaml", family, merge_method="dare_ties")
    one = write(open_merge(file, MergeRun(seed=4, threads=1)), tmp_path / "one")
    write(open_merge(file, MergeRun(seed=4, threads=3)), tmp_path / "three")
    assert content(tmp_path / "one") == content(tmp_path / "three")
    sharded = write(open_merge(file, MergeRun(seed=4)), tmp_path / "shards", shard_bytes="100kB")
    assert len([name for name in sharded.files if name.endswith(".safetensors")]) > 3
    whole, parts = open_path(tmp_path / "one"), open_path(tmp_path / "shards")
    assert one.identity == sharded.identity and whole.identity == parts.identity
    other = write(open_merge(file, MergeRun(seed=5)), tmp_path / "other")
    assert open_path(other.path).identity != whole.identity


def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    write(open_merge(file), tmp_path / "calm")
    real, count = gnomon.merge.writer._write_tensor, 0

    def failing(*arguments: object) -> None:
        nonlocal count
        count += 1
        if count > 17:
            raise KeyboardInterrupt
        real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(gnomon.merge.writer, "_write_tensor", failing)
    with pytest.raises(KeyboardInterrupt):
        write(open_merge(file, MergeRun(threads=1)), tmp_path / "out")
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    with pytest.raises(Exception, match=r"config\.json"):
        open_path(tmp_path / "out.partial")
    monkeypatch.undo()
    again = write(open_merge(file), tmp_path / "out")
    assert again.resumed == 17 and content(tmp_path / "out") == content(tmp_path / "calm")


def test_a_journal_line_whose_tensor_is_not_on_disk_is_not_believed(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    write(open_merge(file), tmp_path / "calm")
    monkeypatch.setattr(gnomon.merge.writer, "finish", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        write(open_merge(file), tmp_path / "out")
    monkeypatch.undo()
    weights = tmp_path / "out.partial" / "model.safetensors"
    with weights.open("r+b") as damaged:
        damaged.seek(-4, os.SEEK_END)
        damaged.write(b"\0\0\0\0")
    again = write(open_merge(file), tmp_path / "out")
    assert again.resumed == again.tensors - 1 and content(tmp_path / "out") == content(tmp_path / "calm")


KILLED = "import sys; from gnomon.cli.main import main; main(['merge', 'run', sys.argv[1], sys.argv[2], '-j', '1'])"


def test_killed_at_any_moment_the_rerun_gives_the_same_bytes(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    write(open_merge(file), tmp_path / "calm")
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(file), str(out)], stdout=subprocess.DEVNULL)
    while process.poll() is None and not partial.exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert out.exists() != partial.exists()
    merge(file, out=out)
    assert content(out) == content(tmp_path / "calm") and not partial.exists()


def test_a_full_disk_leaves_nothing_under_the_final_name(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gnomon.merge.writer.os, "pwrite", full)
    with pytest.raises(MergeError, match=r"disk of .* is full"):
        write(open_merge(file), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_directory_is_not_overwritten_unless_asked(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious.txt").write_text("mine")
    with pytest.raises(MergeError, match="already exists"):
        merge(file, out=tmp_path / "out")
    merge(file, out=tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out" / "precious.txt").exists()
    assert write(open_merge(file), tmp_path / "out").seconds == 0.0  # recognised: nothing to do


def test_too_little_memory_is_refused_before_anything_is_made(family: Family, tmp_path: Path) -> None:
    file = ties_file(tmp_path / "merge.yaml", family)
    with pytest.raises(MergeError, match=r"needs \d+ MB .* more than the 100 MB"):
        merge(file, out=tmp_path / "out", max_memory="100MB")
    assert not (tmp_path / "out.partial").exists()


def test_an_input_at_fault_leaves_nothing_half_written(family: Family, tmp_path: Path) -> None:
    broken = fine_tune(family["base"], tmp_path / "broken", 5)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, broken / "model.safetensors")
    file = ties_file(tmp_path / "merge.yaml", family | {"c": broken})
    with pytest.raises(MergeError, match=r"`model\.norm\.weight` of .*broken holds NaN"):
        merge(file, out=tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_a_model_of_another_base_is_told_with_its_distance_before_the_merge(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    far = fine_tune(family["base"], tmp_path / "far", 6, spread=2.0)
    file = ties_file(tmp_path / "merge.yaml", family | {"b": far})
    assert run(["merge", str(file), str(tmp_path / "out")]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "hardly a fine-tune" in line]
    assert len(told) == 1 and re.search(r"far lies \d+\.\d\d of the base's norm away", told[0])
