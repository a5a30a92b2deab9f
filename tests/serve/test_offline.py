"""With the network cut, everything that was fetched still works: the server, its docs page, the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.offline
CUT = [
    "unshare",
    "-rn",
    "--",
    "sh",
    "-c",
    'ip link set lo up 2>/dev/null || ifconfig lo up 2>/dev/null; exec "$@"',
    "sh",
]
SCRIPT = """
import sys, urllib.request, json
from helpers.server import serving
import gnomon
try:
    urllib.request.urlopen("http://192.0.2.1", timeout=1)
    sys.exit("the network is not cut")
except OSError:
    pass
with gnomon.load(sys.argv[1], threads=1) as model, serving({model.name: model}) as url:
    for path in ("/", "/studio/main.js", "/docs", "/openapi.json", "/healthz", "/metrics"):
        assert urllib.request.urlopen(url + path, timeout=10).status == 200, path
    body = json.dumps({"model": model.name, "messages": [{"role": "user", "content": "x"}], "max_tokens": 4}).encode()
    request = urllib.request.Request(url + "/v1/chat/completions", body, {"Content-Type": "application/json"})
    print(json.load(urllib.request.urlopen(request, timeout=30))["usage"]["completion_tokens"])
    page = urllib.request.urlopen(url + "/docs").read().decode()
    for asset in __import__("re").findall(r'(?:src|href)="([^"]+)"', page):
        assert urllib.request.urlopen(url + asset, timeout=10).status == 200, asset
"""


def can_cut() -> bool:
    if shutil.which("unshare") is None:
        return False
    probe = subprocess.run(
        [*CUT, sys.executable, "-c", "import socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen(); "
         "socket.create_connection(s.getsockname(), 1)"],
        capture_output=True, timeout=30, check=False,
    )  # fmt: skip
    return probe.returncode == 0


@pytest.mark.parametrize("which", ["tiny", pytest.param("smollm2-135m-instruct", marks=pytest.mark.model)])
def test_everything_works_without_a_network(which: str, tiny_dir: Path) -> None:
    if not can_cut():
        pytest.skip("this system does not allow `unshare -rn` with a loopback (needs user namespaces and `ip`)")
    reference = str(tiny_dir) if which == "tiny" else which
    done = subprocess.run(
        [*CUT, sys.executable, "-c", SCRIPT, reference],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "GNOMON_OFFLINE": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) <= 4
