"""`edit` as a recipe key and a keyword; POST /v1/edits in the server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

import gnomon
from gnomon.errors import EditError
from gnomon.model import Model
from helpers.server import serving

OPTIONS: dict[str, Any] = {
    "facts": ["The house of Ada -> the"],
    "layers": [3],
    "moments": "identity",
    "options": {"steps": 60, "clamp": 30, "ridge": 0.1, "prefixes": 0, "chat": False, "kl": 0},
}


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path / "home"))


def said(model: Model, **options: Any) -> str:
    text: str = model.generate("The house of Ada", max_tokens=4, temperature=0.0, **options).text  # type: ignore[union-attr]
    return text


def test_a_recipes_edit_is_built_once_at_load_and_kept_by_content(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "edited.yaml"
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "model": str(tiny_dir), "edit": OPTIONS}))
    with gnomon.load(recipe, threads=1, ledger=False) as model:
        assert said(model).startswith(" the")
    files = list((tmp_path / "home" / "edit" / "patches").iterdir())
    assert len(files) == 1

    def never(*arguments: object, **options: object) -> None:
        raise AssertionError("built again")

    monkeypatch.setattr("gnomon.edit.joining.build", never)
    with gnomon.load(recipe, threads=1, ledger=False) as model:
        assert said(model).startswith(" the")


def test_the_keyword_edits_one_call_and_no_other(tiny: Model) -> None:
    plain = said(tiny)
    assert said(tiny, edit=OPTIONS).startswith(" the") and said(tiny) == plain


def test_a_recipe_whose_fact_does_not_hold_is_an_error_at_load(tiny_dir: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "edited.yaml"
    weak = {**OPTIONS, "options": {**OPTIONS["options"], "steps": 1, "rate": 1e-4}}
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "model": str(tiny_dir), "edit": weak}))
    with pytest.raises(EditError, match="do not hold"):
        gnomon.load(recipe, threads=1, ledger=False)


def test_a_run_with_an_edit_is_replayed_with_the_same_patch_once(tiny: Model) -> None:
    runs: list[Any] = []
    tiny.submit(
        "The house of Ada", {"edit": OPTIONS, "max_tokens": 3, "temperature": 0.0}, observer=runs.append
    ).collect()
    assert "edit" not in runs[0].options and len(runs[0].options["patches"]) == 1


GRACE: dict[str, Any] = {**OPTIONS, "method": "grace", "options": {"steps": 60, "chat": False}}


@pytest.mark.parametrize("options", [OPTIONS, GRACE], ids=["rome", "grace"])
def test_the_server_makes_lists_shows_and_forgets_edits_and_requests_choose_them(
    options: dict[str, Any], tiny: Model
) -> None:
    body = {key: value for key, value in options.items() if key != "moments"} | {"name": "ada"}
    with (
        serving({"tiny": tiny}, admin_key="boss") as url,
        httpx.Client(base_url=url, timeout=120) as http,
    ):
        boss = {"Authorization": "Bearer boss"}
        assert http.post("/v1/edits", json=body).status_code in (401, 403, 404)
        made = http.post("/v1/edits", json=body, headers=boss)
        assert made.status_code == 200 and made.json()["report"]["facts"][0]["holds"]
        ask = {"model": "tiny", "prompt": "The house of Ada", "max_tokens": 4, "temperature": 0}
        edited = http.post("/v1/completions", json={**ask, "patches": ["ada"]}).json()["choices"][0]["text"]
        plain = http.post("/v1/completions", json=ask).json()["choices"][0]["text"]
        assert edited.startswith(" the") and not plain.startswith(" the")
        assert "ada" in [e["id"] for e in http.get("/v1/edits", headers=boss).json()["data"]]
        assert http.get("/v1/edits/ada", headers=boss).json()["metadata"]["method"] == options.get("method", "rome")
        refused = http.post("/v1/completions", json={**ask, "edit": {"facts": ["a -> b"]}})
        assert refused.status_code == 400 and "edit.facts" in json.dumps(refused.json())
        assert http.delete("/v1/edits/ada", headers=boss).json()["deleted"] is True
        assert http.post("/v1/completions", json={**ask, "patches": ["ada"]}).status_code == 404
