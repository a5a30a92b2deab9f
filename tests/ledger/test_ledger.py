"""The ledger notes what was generated; a replay compares it bit for bit and finds what differs."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import gnomon
from gnomon.errors import GnomonError, UsageError
from gnomon.generation import Run
from gnomon.ledger import Ledger, parse_age, replay
from gnomon.loading import LEDGER
from gnomon.model import Model


def run_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "gnomon", *arguments], capture_output=True, text=True, timeout=120)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def model(home: Path, tiny_dir: Path) -> Iterator[Model]:
    with gnomon.load(tiny_dir, threads=1, max_sequences=8, ledger=True) as opened:
        yield opened
        LEDGER.flush()


def test_every_kind_of_generation_is_noted_and_replays(model: Model) -> None:
    first: Any = model.generate("hello", max_tokens=9, temperature=0.9, logit_bias={"7": 2.0}, stop=["zzz"])
    two: Any = model.chat("hi", n=2, max_tokens=5, temperature=1.1, seed=5)
    streamed = list(model.stream("abc", max_tokens=4))
    runs = LEDGER.runs()
    assert {run.id for run in runs} == {first.id, two[0].id, streamed[0].id}
    noted = LEDGER.find(first.id)[0]
    assert (noted.text, noted.seed, noted.fingerprint) == (first.text, first.seed, model.fingerprint)
    assert noted.token_ids[: len(first.token_ids)] == first.token_ids
    for name in (first.id, two[0].id, streamed[0].id):
        results = replay(LEDGER.find(name), model)
        assert [result.verdict for result in results] == ["identical"] * (2 if name == two[0].id else 1)
    assert len(LEDGER.runs()) == 4  # replays are not noted


def test_a_replay_in_company_is_identical_and_a_changed_run_is_not(model: Model) -> None:
    done: Any = model.generate("hello there", max_tokens=12, temperature=0.9)
    crowd = [model.submit(f"other {i}", {"max_tokens": 30, "ignore_eos": True}) for i in range(5)]
    runs = LEDGER.find(done.id)
    assert replay(runs, model)[0].ok
    for handle in crowd:
        handle.collect()
    changed = [replace(runs[0], token_ids=[runs[0].token_ids[0] + 1, *runs[0].token_ids[1:]])]
    assert replay(changed, model)[0].detail.endswith("number 0")
    other_logits = replay([replace(runs[0], digest="0" * 64)], model)[0]
    assert (other_logits.verdict, other_logits.detail) == ("different", "the same tokens from other logits")
    elsewhere = replay([replace(runs[0], fingerprint="fp_000000000000")], model)[0]
    assert elsewhere.verdict == "other numbers" and model.fingerprint in elsewhere.detail


def test_weights_changed_by_an_ulp_are_seen(home: Path, tiny_dir: Path) -> None:
    with gnomon.load(tiny_dir, threads=1, max_sequences=2, ledger=True) as model:
        done: Any = model.generate("hello", max_tokens=4)
        runs = LEDGER.find(done.id)
        with model.module() as module, torch.no_grad():
            weight = module.model.layers[0].mlp.down_proj.weight
            weight.copy_(torch.nextafter(weight, torch.tensor(2.0)))
        pretended = [replace(runs[0], fingerprint=model.fingerprint)]
        assert replay(pretended, model)[0].verdict == "different"


def test_cancelled_ones_are_not_noted_and_the_ledger_can_be_off(home: Path, tiny_dir: Path) -> None:
    with gnomon.load(tiny_dir, threads=1, max_sequences=2, ledger=True) as model:
        handle = model.submit("go on", {"max_tokens": 400, "ignore_eos": True})
        handle.cancel()
        handle.collect()
        assert LEDGER.runs() == []
    with gnomon.load(tiny_dir, threads=1, max_sequences=2) as model:  # GNOMON_LEDGER=0 in tests
        model.generate("x", max_tokens=1)
        assert LEDGER.runs() == []


def entry(number: int, text: str = "x") -> Run:
    name, created, options = f"gen-{number:04}", 1000.0 + number, {"temperature": 0.5}
    return Run(name, 0, created, "m", "m", "fp_x", "fp32", [1, 2, 3], options, True, 2**64 - 1, [4], text)


def test_it_is_private_small_and_keeps_the_newest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_LEDGER_MB", "0.5")
    ledger = Ledger(tmp_path / "l.sqlite")
    for number in range(1000):
        ledger.add(entry(number, "y" * 2000))
        if number % 100 == 99:
            ledger.flush()
    runs = ledger.runs()
    assert runs[0] == entry(999, "y" * 2000)
    assert 50 < len(runs) < 500
    assert stat.S_IMODE(ledger.path.stat().st_mode) == 0o600
    assert [run.id for run in ledger.runs(limit=2)] == ["gen-0999", "gen-0998"]
    assert ledger.remove(before=1000.0 + 990) == len(runs) - 10
    with pytest.raises(UsageError, match="could be"):
        ledger.find("gen-")
    with pytest.raises(UsageError, match="No run"):
        ledger.find("nothing")
    ledger.close()


def test_a_damaged_file_is_an_error_for_reading_and_a_warning_for_generating(
    home: Path, tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    home.mkdir()
    (home / "ledger.sqlite").write_bytes(b"this is no database, it is a text of some length" * 40)
    with gnomon.load(tiny_dir, threads=1, max_sequences=2, ledger=True) as model:
        done: Any = model.generate("x", max_tokens=2)
        assert len(done.token_ids) <= 2
        with pytest.raises(GnomonError, match=r"ledger\.sqlite"):
            LEDGER.runs()
    assert "cannot be used" in caplog.text


def test_ages() -> None:
    assert abs(time.time() - 7200 - parse_age("2h")) < 5
    with pytest.raises(UsageError, match="1d"):
        parse_age("soon")


def test_the_commands(model: Model, tiny_dir: Path, home: Path) -> None:
    done: Any = model.generate("hello", max_tokens=5, temperature=0.7)
    LEDGER.flush()
    listed = json.loads(run_command("runs", "ls", "--json").stdout)
    assert listed[0]["id"] == done.id
    assert done.text.strip()[:5] in run_command("runs", "show", done.id[:12]).stdout
    good = run_command("replay", done.id[:12])
    assert good.returncode == 0 and "1 of 1 identical bit for bit" in good.stdout, good.stderr
    assert "1 of 1" in run_command("replay", "--all", "--since", "1h").stdout
    assert run_command("replay").returncode == 2
    assert "1 deleted" in run_command("runs", "rm", done.id).stdout
    missing = run_command("runs", "show", done.id)
    assert missing.returncode == 2 and "runs ls" in missing.stderr
