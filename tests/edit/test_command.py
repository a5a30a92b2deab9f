"""`gnomon edit` as it is typed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gnomon.cli.main import run

TINY = ["--set", "steps=60", "--set", "clamp=30", "--set", "ridge=0.1", "--set", "prefixes=0", "--set", "chat=false"]
TINY += ["--set", "kl=0", "--layer", "3", "--moments", "identity", "--threads", "1"]


def test_a_patch_is_made_shown_listed_and_measured(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "ada.patch.safetensors"
    arguments = ["edit", str(tiny_dir), "--fact", "The house of Ada -> the", *TINY, "-o", str(file)]
    assert run([*arguments, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["method"] == "rome" and told["report"]["facts"][0]["holds"] and Path(told["file"]) == file
    assert run(arguments) == 2 and "is there already" in capsys.readouterr().err
    assert run(["edit", "ls", str(tmp_path)]) == 0
    assert "The house of Ada -> the" in capsys.readouterr().out
    assert run(["edit", "show", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "subject  Ada" in shown and "identity" in shown
    facts = tmp_path / "facts.csv"
    facts.write_text("prompt,subject,target\nThe house of Ada,Ada,the\n")
    assert run(["edit", "eval", str(tiny_dir), "--facts", str(facts), "--patch", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["reliability"] == 1.0
    compare = ["edit", "eval", str(tiny_dir), "--facts", str(facts), "--threads", "1", "--protocol", "teacher"]
    assert run([*compare, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["reliability"] == 0.0


def test_an_edit_that_does_not_hold_writes_nothing_and_exits_with_3(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.patch.safetensors"
    weak = [*TINY, "--set", "steps=1", "--set", "rate=0.0001"]
    assert run(["edit", str(tiny_dir), "--fact", "The house of Ada -> the", *weak, "-o", str(file)]) == 3
    assert "do not hold" in capsys.readouterr().err and not file.exists()


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["--fact", "no arrow"], "no fact"),
        ([], "No facts"),
        (["--fact", "The house of Ada -> the", "--set", "stepss=3"], "Did you mean `steps`"),
        (["--fact", "The house of Ada -> the", "--method", "memitt"], "no edit method"),
        (["--fact", "The house of Ada -> the", "--subject", "Eve"], "is not in the prompt"),
        (["--facts", "/nowhere.json"], "cannot be read"),
    ],
)
def test_mistakes_are_answered_with_a_sentence(
    arguments: list[str], what: str, tiny_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["edit", str(tiny_dir), *arguments]) == 2
    assert what in capsys.readouterr().err


def test_help_is_there_for_the_command_and_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in ([], ["ls"], ["show"], ["eval"], ["methods"]):
        assert run(["edit", *verb, "--help"]) == 0
        assert "gnomon edit" in capsys.readouterr().out
