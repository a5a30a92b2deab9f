"""GET /v1/determinism, and a model that fails its self-test."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import gnomon
from gnomon.model import Model
from helpers.server import serving


def certificate_of(url: str) -> Any:
    for _ in range(300):
        answer = httpx.get(f"{url}/v1/determinism").json()["data"][0]
        if answer["certificate"] is not None:
            return answer
        time.sleep(0.1)
    raise AssertionError("no certificate after 30 s")


def test_the_certificate_is_shown(tiny: Model) -> None:
    with serving({"tiny": tiny}) as url:
        answer = certificate_of(url)
        metrics = httpx.get(f"{url}/metrics").text
    assert answer["certificate"]["passed"] and answer["certificate"]["fingerprint"] == tiny.fingerprint
    assert "sentinel_mismatches_total" in metrics


def test_a_model_that_fails_is_not_served_unless_told(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    with gnomon.load(tiny_dir, kernel="torch", threads=1, max_sequences=2) as model:
        operators: Any = model.network.operators  # type: ignore[union-attr]
        plain = operators.linear

        def linear(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
            out: torch.Tensor = plain(x, *arguments)
            return out * 1.0001 if len(x) == 1 else out

        monkeypatch.setattr(operators, "linear", linear)
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        with serving({"m": model}) as url:
            assert not certificate_of(url)["certificate"]["passed"]
            refused = httpx.post(f"{url}/v1/chat/completions", json=body)
            monkeypatch.setenv("GNOMON_UNCERTIFIED", "1")
            served = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert refused.status_code == 503 and "self-test" in refused.text
    assert served.status_code == 200
