"""hf: references through the real huggingface_hub client, against a hub of this machine that speaks its HTTP routes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The routes a snapshot needs: a revision, its files, and each file."""

    folder: Path
    asked: list[str]

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        self.asked.append(f"{self.command} {self.path}")
        route = self.path.split("?")[0]
        if route.startswith("/api/models/org/tiny/tree/"):
            files = [(path.name, path.stat().st_size) for path in sorted(self.folder.iterdir())]
            tree = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in files]
            self._send(json.dumps(tree).encode(), body, "tree")
        elif route.startswith("/api/models/org/tiny") and route.rsplit("/", 1)[-1] in ("main", "v1", COMMIT, "tiny"):
            names = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            self._send(json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": names}).encode(), body, "info")
        elif route.startswith("/org/tiny/resolve/") and (self.folder / route.rsplit("/", 1)[-1]).is_file():
            data = (self.folder / route.rsplit("/", 1)[-1]).read_bytes()
            self._send(data, body, hashlib.sha256(data).hexdigest())
        else:
            self.send_response(404)
            self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()

    def _send(self, data: bytes, body: bool, tag: str) -> None:
        self.send_response(200)
        self.send_header("ETag", f'"{tag}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tiny_dir: Path) -> Iterator[tuple[str, list[str]]]:
    asked: list[str] = []
    handler = type("TheHub", (Hub,), {"folder": tiny_dir, "asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()


def gnomon(reference: str, home: Path, endpoint: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`gnomon generate` in a process of its own: huggingface_hub reads its address when it is imported."""
    env = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **environment}
    if "GNOMON_OFFLINE" not in environment:
        env.pop("GNOMON_OFFLINE", None)
    command = [sys.executable, "-m", "gnomon", "generate", "hello", "--model", reference, "--max-tokens", "4", "--json"]
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)


def test_a_model_of_the_hub_answers_as_its_folder_does(
    hub: tuple[str, list[str]], tmp_path: Path, tiny_dir: Path
) -> None:
    endpoint, asked = hub
    fetched = gnomon("hf:org/tiny@v1", tmp_path, endpoint)
    assert fetched.returncode == 0, fetched.stderr
    local = gnomon(str(tiny_dir), tmp_path, endpoint)
    assert local.returncode == 0, local.stderr
    expected = json.loads(local.stdout)["token_ids"]
    assert len(expected) == 4 and json.loads(fetched.stdout)["token_ids"] == expected
    assert any("/resolve/" in line and line.startswith("GET") for line in asked)
    asked.clear()
    again = gnomon("hf:org/tiny@v1", tmp_path, endpoint, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout)["token_ids"] == expected
    assert asked == []


def test_an_unknown_repository_and_no_network_are_told_apart_from_a_bad_model(
    hub: tuple[str, list[str]], tmp_path: Path
) -> None:
    endpoint, _ = hub
    missing = gnomon("hf:org/nothing", tmp_path, endpoint)
    assert missing.returncode != 0 and "org/nothing" in missing.stderr and "Traceback" not in missing.stderr
    away = gnomon("hf:org/tiny", tmp_path / "new", "http://127.0.0.1:9", GNOMON_OFFLINE="1")
    assert away.returncode != 0 and "Traceback" not in away.stderr
    unreachable = gnomon("hf:org/tiny", tmp_path / "new", "http://127.0.0.1:9")
    assert unreachable.returncode != 0 and "Traceback" not in unreachable.stderr
