"""Every example of the pages runs: ```python blocks (a page's blocks share names) and `$ gnomon` lines."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from gnomon.cli.main import COMMANDS, _capability_commands, run
from gnomon.merge.config import parse_config
from gnomon.model import Model
from gnomon.recipe import check_recipe
from helpers.server import serving

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_PYTHON = [page for page in PAGES if "```python" in page.read_text()]
LINES = [
    (page.name, line[2:])
    for page in PAGES
    for block in re.findall(r"```console\n(.*?)```", page.read_text(), re.DOTALL)
    for line in block.splitlines()
    if line.startswith("$ gnomon")
]


@pytest.mark.model
@pytest.mark.parametrize("page", WITH_PYTHON, ids=lambda page: page.name)
def test_the_python_examples_run(page: Path, smollm2: Model) -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        if "127.0.0.1:8000" not in block:
            exec(compile(block, str(page), "exec"), names)
            continue
        with serving({"smollm2-135m-instruct": smollm2}) as url:
            exec(compile(block.replace("http://127.0.0.1:8000", url), str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_recipes_of_a_page_are_recipes(page: Path) -> None:
    for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
        content = yaml.safe_load(block)
        if "merge_method" in content:
            parse_config(content, page.name)
        else:
            check_recipe(content, page.name)


@pytest.mark.model
@pytest.mark.parametrize(("page", "line"), LINES, ids=lambda value: str(value)[:40])
def test_the_commands_run(page: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(shlex.split(line)[1:]) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_link_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name in re.findall(r"(?:`|^\$ |^    )gnomon ([a-z]+)", text, re.MULTILINE):
        assert name in COMMANDS or name in _capability_commands(), name
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:src|tests|scripts|docs|benchmarks)/[\w./-]+\.\w+)`", text):
        assert (ROOT / file).exists(), file


def test_every_direct_dependency_has_its_line() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = (ROOT / "docs" / "dependencies.md").read_text()
    for requirement in project["dependencies"]:
        name = re.split(r"[<>=\[]", requirement)[0]
        assert name in listed, name
