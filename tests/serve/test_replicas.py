"""Replicas as Ray actors: the same bits, and one that is killed comes back."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import httpx
import pytest

from gnomon.cli.main import run
from gnomon.errors import CheckpointError, GnomonError
from gnomon.recipe import ServeOptions
from gnomon.serve.replicas import RayFleet, serve_replica


def test_a_replica_is_a_whole_server_for_the_routers_key_alone(tiny_dir: Path) -> None:
    options = ServeOptions(port=0, api_key="between-us", served_name="tiny")
    url, fingerprint = serve_replica(str(tiny_dir), {"threads": 1, "max_sequences": 2}, options)
    body = {"model": "tiny", "prompt": "the", "max_tokens": 3, "seed": 1}
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=30).status_code == 401
    headers = {"Authorization": "Bearer between-us"}
    reply = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=30).json()
    assert reply["system_fingerprint"] == fingerprint


@pytest.mark.parametrize(("flag", "value"), [("--admin-key", "k"), ("--embeddings", "minilm-l6-v2")])
def test_what_replicas_cannot_do_is_refused_by_name(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--replicas", "2", flag, value]) == 2
    assert f"{flag} does not work with --replicas" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_actor_comes_back_under_another_address(tiny_dir: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="ray is not installed (extra `cluster`)")
    options = ServeOptions(served_name="tiny")
    fleet = RayFleet(2, str(tiny_dir), {"threads": 1, "max_sequences": 2}, options)
    try:
        fleet.wait()
        before = fleet.addresses()
        os.kill(fleet.process_ids()[1], signal.SIGKILL)
        deadline = time.monotonic() + 240
        while fleet.addresses().get(1) in (None, before[1]) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert fleet.addresses()[0] == before[0] and fleet.addresses()[1] != before[1]
        assert len(set(fleet.fingerprints.values())) == 1
    finally:
        fleet.close()
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    broken = RayFleet(1, str(tmp_path), {}, options)
    try:
        with pytest.raises((CheckpointError, GnomonError)):
            broken.wait()
    finally:
        broken.close()
