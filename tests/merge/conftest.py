"""Models for merging: a base and fine-tunes of it, tiny, seeded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.tiny import write_tiny_model


def fine_tune(base: Path, path: Path, seed: int, spread: float = 0.02, dtype: torch.dtype | None = None) -> Path:
    """A copy of a model directory with seeded noise on every weight."""
    path.mkdir(parents=True, exist_ok=True)
    for file in base.iterdir():
        if file.suffix != ".safetensors":
            (path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: weight + spread * torch.randn(weight.shape, generator=generator)
        for name, weight in sorted(load_file(base / "model.safetensors").items())
    }
    save_file({n: t.to(dtype) if dtype else t for n, t in tensors.items()}, path / "model.safetensors")
    return path


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """base, a, b, c: one network, the last three fine-tuned from the first."""
    root = tmp_path_factory.mktemp("family")
    base = write_tiny_model(root / "base")
    return {"base": base} | {name: fine_tune(base, root / name, seed) for seed, name in enumerate("abc", start=1)}


def ties_file(path: Path, family: dict[str, Path], **more: object) -> Path:
    """A merge file of three models."""
    models = [{"model": str(family[n]), "parameters": {"weight": 0.5, "density": 0.4}} for n in "abc"]
    content = {"merge_method": "ties", "base_model": str(family["base"]), "models": models} | more
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path
