"""`gnomon ensemble`, and recipes with an ensemble through the other commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from gnomon.cli.main import run
from gnomon.model import Model


def test_generate_prints_the_text_and_the_votes(
    duo_dirs: list[Path], duo: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    members = [part for path in duo_dirs for part in ("-m", str(path))]
    line = ["ensemble", "generate", *members, "--threads", "1", "--max-tokens", "4", "abc"]
    assert run(line) == 0
    assert capsys.readouterr().out.rstrip("\n") == duo.generate("abc", max_tokens=4).text.rstrip("\n")  # type: ignore[union-attr]
    assert run([*line, "--trace", "--weights", "2,1"]) == 0
    assert "tiny-gemma" in capsys.readouterr().out
    assert run([*line, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["details"]["ensemble"]["steps"] == 4
    assert run([*line, "--weights", "two"]) == 2
    assert run([*line, "--when", "gate"]) == 2
    assert "needs a threshold" in capsys.readouterr().err


def test_a_recipe_with_an_ensemble_works_in_every_command(
    duo_dirs: list[Path], duo: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "two.yaml"
    block = {"members": [str(duo_dirs[0]), {"model": str(duo_dirs[1]), "weight": 1}]}
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "name": "two", "ensemble": block, "sampling": {"max_tokens": 4}}))
    expected = duo.generate("abc", max_tokens=4).text.rstrip("\n")  # type: ignore[union-attr]
    for line in (["generate", "-m", str(recipe)], ["ensemble", "generate", "-m", str(recipe), "--max-tokens", "4"]):
        assert run([*line, "--threads", "1", "abc"]) == 0
        assert capsys.readouterr().out.rstrip("\n") == expected
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "model": "x", "ensemble": block}))
    assert run(["ensemble", "generate", "-m", str(recipe), "abc"]) == 2
    assert "Keep one of them" in capsys.readouterr().err
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "colour": 1, "ensemble": block}))
    assert run(["ensemble", "generate", "-m", str(recipe), "abc"]) == 2
    assert "colour" in capsys.readouterr().err


def test_check_and_sweep_print_tables(duo_dirs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the band in the sand")
    refs = list(map(str, duo_dirs))
    more = ["--text", str(text), "--threads", "1"]
    assert run(["ensemble", "check", *refs, *more]) == 0
    assert "of token boundaries" in capsys.readouterr().out
    assert run(["ensemble", "sweep", *refs, *more]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 11
    assert run(["ensemble", "sweep", "--threshold", *refs, *more]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("1.0\t1.0\t")
