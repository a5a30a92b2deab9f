"""Patches over HTTP: requests name them, the operator loads and removes them, nobody reaches a file through a name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import gnomon
from gnomon.errors import UsageError
from gnomon.model import Model
from gnomon.models.patch import Patch
from gnomon.models.reference import open_checkpoint
from helpers.patches import random_patch
from helpers.server import serving

ADMIN = {"Authorization": "Bearer boss"}
BODY = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 1, "temperature": 0.7}


@pytest.fixture(scope="module")
def patch(tiny_dir: Path) -> Patch:
    return random_patch(open_checkpoint(tiny_dir), 1)


@pytest.fixture(scope="module")
def file(patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patch.save(tmp_path_factory.mktemp("p") / "one.patch.safetensors")


@pytest.fixture
def model(tiny_dir: Path) -> Iterator[Model]:
    with gnomon.load(tiny_dir, threads=1, max_sequences=8) as model:
        yield model


@pytest.fixture
def url(model: Model) -> Iterator[str]:
    with serving({"tiny": model}, api_key="user", admin_key="boss") as url:
        yield url


def complete(url: str, **more: object) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json=BODY | more, headers={"Authorization": "Bearer user"}, timeout=30)


def test_the_operator_loads_a_patch_and_requests_name_it(url: str, model: Model, file: Path, patch: Patch) -> None:
    plain = complete(url).json()
    assert complete(url, patches=["one"]).status_code == 404
    made = httpx.post(f"{url}/v1/patches", json={"name": "one", "file": str(file)}, headers=ADMIN).json()
    assert (made["id"], made["identity"], made["model"], made["rank"]) == ("one", patch.identity, "tiny", 3)
    listed = httpx.get(f"{url}/v1/patches", headers=ADMIN).json()["data"]
    assert [entry["id"] for entry in listed] == ["one"]
    patched = complete(url, patches=["one"]).json()
    view = model.with_patches([patch])
    expected = view.generate("abc", **{k: v for k, v in BODY.items() if k not in ("model", "prompt")})
    assert patched["choices"][0]["text"] == expected.text
    assert patched["system_fingerprint"] == expected.fingerprint != plain["system_fingerprint"]
    assert complete(url).json()["choices"] == plain["choices"]
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "abc"}], "max_tokens": 3, "patches": ["one"]}
    answer = httpx.post(f"{url}/v1/chat/completions", json=chat, headers={"Authorization": "Bearer user"}, timeout=30)
    assert answer.json()["system_fingerprint"] == expected.fingerprint
    gone = httpx.delete(f"{url}/v1/patches/one", headers=ADMIN).json()
    assert gone["deleted"] and complete(url, patches=["one"]).status_code == 404
    assert httpx.delete(f"{url}/v1/patches/one", headers=ADMIN).status_code == 404


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "", "one.patch.safetensors", "x\0y", "..", "%2e%2e", "a" * 5000]
)
def test_a_request_reaches_no_file_whatever_name_it_gives(url: str, name: str, file: Path, monkeypatch) -> None:
    monkeypatch.chdir(file.parent)  # a patch of this very name lies here
    monkeypatch.setattr("gnomon.patches.table.open_patch", lambda *_: pytest.fail("a request opened a file"))
    answer = complete(url, patches=[name])
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "patch_not_found"
    assert len(answer.text) < 500


def test_an_identity_in_a_request_recalls_no_file(url: str, model: Model, file: Path, patch: Patch) -> None:
    model.with_patches([file]).close()  # its place is remembered now
    assert complete(url, patches=[patch.identity]).status_code == 404


@pytest.mark.parametrize("wrong", [[1], {"a": 1}, [["x"]], ["x"] * 17])
def test_malformed_lists_are_400_with_the_field(url: str, wrong: object) -> None:
    answer = complete(url, patches=wrong)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("patches")


def test_the_routes_are_the_operators_alone(url: str, model: Model, file: Path) -> None:
    user = {"Authorization": "Bearer user"}
    body = {"name": "x", "file": str(file)}
    assert httpx.get(f"{url}/v1/patches", headers=user).status_code == 403
    assert httpx.post(f"{url}/v1/patches", json=body, headers=user).status_code == 403
    assert httpx.delete(f"{url}/v1/patches/x", headers=user).status_code == 403
    assert httpx.get(f"{url}/v1/patches").status_code == 401
    with serving({"tiny": model}) as keyless:
        refused = httpx.post(f"{keyless}/v1/patches", json=body)
        assert refused.status_code == 403 and "--admin-key" in refused.text
    with serving({"tiny": model}, admin_key="boss") as keyless:
        assert httpx.get(f"{keyless}/v1/patches").status_code == 403
        assert httpx.get(f"{keyless}/v1/patches", headers=ADMIN).json()["data"] == []
    assert len(model.patches) == 0


def test_what_the_operator_gets_wrong_is_said_and_changes_nothing(url: str, model: Model, file: Path, tmp_path) -> None:
    def post(**body: object) -> httpx.Response:
        return httpx.post(f"{url}/v1/patches", json=body, headers=ADMIN)

    assert post(name="a/b", file=str(file)).status_code == 400
    assert post(name="x", file=str(tmp_path / "no")).status_code == 400
    assert post(name="x", file=str(file), model="other").status_code == 404
    assert post(name="x").status_code == 400
    other = Patch(Patch.load(file).deltas, "0" * 64).save(tmp_path / "other.patch.safetensors")
    assert post(name="x", file=str(other)).json()["error"]["code"] == "wrong_base"
    (tmp_path / "bad").write_bytes(b"nonsense")
    assert post(name="x", file=str(tmp_path / "bad")).json()["error"]["code"] == "bad_patch"
    assert len(model.patches) == 0
    assert post(name="x", file=str(file)).status_code == post(name="x", file=str(file)).status_code == 200


def test_serve_loads_patches_named_on_the_command_line(tiny_dir: Path, file: Path, capsys) -> None:
    from gnomon.cli.serve import load_patches

    with gnomon.load(tiny_dir, threads=1, max_sequences=2) as model:
        load_patches(model, [f"one={file}"])
        assert "one" in model.patches
        with pytest.raises(UsageError, match="NAME=FILE"):
            load_patches(model, ["one"])
