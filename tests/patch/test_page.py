"""The shell lines of docs/patch.md, in order, on tiny models."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gnomon.cli.main import run
from helpers.tiny import write_tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "patch.md"


def test_every_shell_line_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "base")
    shutil.copytree("base", "tuned")
    tensors = load_file("base/model.safetensors")
    save_file({name: t + torch.randn(t.shape) * 0.01 for name, t in tensors.items()}, "tuned/model.safetensors")
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", PAGE.read_text(), re.DOTALL)
        for line in block.splitlines()
        if not line.startswith("gnomon serve")
    ]
    assert len(lines) > 10
    for line in lines:
        assert run(shlex.split(line)[1:]) == 0, (line, capsys.readouterr().err)
        assert capsys.readouterr().out.strip(), line
