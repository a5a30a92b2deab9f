"""Fixtures that several rooms share: tiny models, the real ones, and what an environment must have."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything reads triton: its kernels run here without a GPU

from gnomon.ensemble import Ensemble
from gnomon.errors import FetchError
from gnomon.loading import load
from gnomon.model import Model
from helpers.tiny import tiny_pieces_tokenizer, write_tiny_model


def need(condition: bool, reason: str, switch: str) -> None:
    """Skip with the reason, unless the environment demands it: then fail."""
    if not condition:
        if os.environ.get(switch) == "1":
            pytest.fail(f"{switch}=1, but {reason}")
        pytest.skip(reason)


os.environ.setdefault("GNOMON_LEDGER", "0")  # tests that mean the ledger say so


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test reads the developer's own configuration."""
    monkeypatch.setenv("GNOMON_CONFIG", str(tmp_path / "no-config.yaml"))
    for name in ("GNOMON_MODEL", "GNOMON_PROFILE", "GNOMON_API_KEY", "GNOMON_DEBUG"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> Iterator[Model]:
    with load(tiny_dir, threads=1, max_sequences=16) as model:
        yield model


@pytest.fixture(scope="session")
def duo_dirs(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two models of different networks and vocabularies."""
    other = tmp_path_factory.mktemp("models") / "tiny-gemma"
    return [tiny_dir, write_tiny_model(other, "gemma3", seed=1, tokenizer=tiny_pieces_tokenizer())]


@pytest.fixture(scope="session")
def duo(duo_dirs: list[Path]) -> Iterator[Model]:
    """An ensemble of both."""
    with Ensemble(duo_dirs, threads=1, max_sequences=16) as model:
        yield model


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Model]:
    with load("smollm2-135m-instruct") as model:
        yield model


@pytest.fixture(scope="session")
def gemma() -> Iterator[Model]:
    try:
        model = load("gemma-3-270m")
    except FetchError as error:
        pytest.skip(f"{error} (or set GNOMON_ACCEPT_LICENSE=gemma-3-270m)")
    with model:
        yield model


@pytest.fixture(scope="session")
def data() -> Path:
    """Test data beside the project."""
    folder = Path(os.environ.get("GNOMON_DATA", Path(__file__).parents[1] / ".." / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no test data at {folder} (set GNOMON_DATA)")
    return folder
