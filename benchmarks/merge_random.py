"""Random merge files, random tensors, tiny models: what `merge.py` gives to mergekit and to us, by the seed."""

from __future__ import annotations

import random
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from merge_bench import ROOT
from safetensors.torch import load_file, save_file

BASED = ["task_arithmetic", "ties", "dare_linear", "dare_ties", "breadcrumbs", "breadcrumbs_ties", "della",
         "della_linear", "sce", "ram", "ramplus_tl", "model_stock"]  # fmt: skip
METHODS = ["linear", "slerp", "nuslerp", "multislerp", "karcher", "nearswap", "arcee_fusion", "passthrough", *BASED]
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
WITHOUT_WEIGHTS = ("sce", "ram", "ramplus_tl", "model_stock")
ARITHMETIC = [method for method in BASED if method not in WITHOUT_WEIGHTS]
SHAPES = [(1,), (7,), (4, 6), (33, 17), (64, 48), (200,)]
LAYERS = 4


def tiny_models(folder: Path, dtype: torch.dtype) -> list[str]:
    """Five tiny Llamas: a base and four models near it."""
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.tiny import write_tiny_model

    base = folder / "m0"
    paths = [str(base)]
    if not base.exists():
        write_tiny_model(base)
        tensors = load_file(base / "model.safetensors")
        save_file({n: t.to(dtype) for n, t in tensors.items()}, base / "model.safetensors", {"format": "pt"})
    tensors = load_file(base / "model.safetensors")
    for k in range(1, 5):
        path = folder / f"m{k}"
        paths.append(str(path))
        if not path.exists():
            shutil.copytree(base, path)
            generator = torch.Generator().manual_seed(k)
            noisy = {
                n: (t.float() + 0.03 * t.float().std() * torch.randn(t.shape, generator=generator)).to(dtype)
                for n, t in sorted(tensors.items())
            }
            save_file(noisy, path / "model.safetensors", {"format": "pt"})
    return paths


def setting(draw: random.Random, low: float, high: float) -> Any:
    """A scalar, a gradient, or a filtered list (of a scalar or a gradient)."""
    number = lambda: round(draw.uniform(low, high), 3)  # noqa: E731
    kind = draw.randrange(5)
    if kind == 0:
        return [number() for _ in range(draw.randint(2, 4))]
    if kind == 1:
        return [{"filter": draw.choice(["mlp", "self_attn", "norm"]), "value": number()}, {"value": number()}]
    if kind == 2:
        return [{"filter": "mlp", "value": [number(), number()]}, {"value": number()}]
    return number()


def random_file(seed: int, models: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """A merge file. models: the first is the base where one is used."""
    draw = random.Random(seed)
    method = METHODS[seed % len(METHODS)]
    count = 1 if method in ("slerp", "nearswap", "arcee_fusion", "passthrough") else 2 if method == "nuslerp" else 3
    entries: list[dict[str, Any]] = [{"model": m} for m in draw.sample(models[1:], count)]
    for entry in entries:
        if given := _own(draw, method):
            entry["parameters"] = given
    content: dict[str, Any] = {"merge_method": method}
    optional = method in ("nuslerp", "multislerp") and draw.random() < 0.4
    if method in ("slerp", "nearswap", "arcee_fusion", *BASED) or optional:
        content["base_model"] = models[0]
    if draw.random() < 0.4:
        content["slices"] = _slices(draw, entries, models[0] if "base_model" in content else None)
    elif method == "slerp":
        content["models"] = [*entries, {"model": models[0]}]
    else:
        content["models"] = entries
    if shared := _shared(draw, method):
        content["parameters"] = shared
    if draw.random() < 0.15:
        content["out_dtype"] = draw.choice(["float32", "bfloat16", "float16"])
    if draw.random() < 0.15:
        content["dtype"] = draw.choice(["float32", str(dtype).removeprefix("torch.")])
    return content


def _own(draw: random.Random, method: str) -> dict[str, Any]:
    """One model's parameters."""
    given: dict[str, Any] = {}
    if method in ARITHMETIC or method in ("linear", "nuslerp", "multislerp"):
        given["weight"] = setting(draw, 0.1, 1.2)
    if method.startswith("della"):
        given |= {"density": round(draw.uniform(0.35, 0.65), 3), "epsilon": round(draw.uniform(0.05, 0.2), 3)}
    elif method in ARITHMETIC and method != "task_arithmetic":
        given["density"] = setting(draw, 0.2, 1.0)
    if method.startswith("breadcrumbs"):
        given["gamma"] = setting(draw, 0.0, 0.1)
    if method == "passthrough" and draw.random() < 0.5:
        given["scale"] = setting(draw, 0.5, 1.5)
    return given


def _shared(draw: random.Random, method: str) -> dict[str, Any]:
    """The parameters of the whole file."""
    if method in ("slerp", "nearswap"):
        return {"t": setting(draw, 0.0, 1.0)}
    if method in ARITHMETIC:
        found: dict[str, Any] = {"normalize": draw.random() < 0.5, "lambda": round(draw.uniform(0.5, 1.2), 2)}
        if method in RANDOM or method == "ties":
            found["rescale"] = draw.random() < 0.5
        return found
    if method == "sce":
        return {"select_topk": round(draw.uniform(0.1, 1.0), 2)}
    if method.startswith("ram"):
        return {"epsilon": 0.01}
    if method == "nuslerp" and draw.random() < 0.6:
        return {"nuslerp_flatten": False, "nuslerp_row_wise": draw.random() < 0.5}
    if method == "model_stock":
        return {"filter_wise": draw.random() < 0.5}
    if method == "linear":
        return {"normalize": draw.random() < 0.7}
    return {}


def _slices(draw: random.Random, entries: list[dict[str, Any]], base: str | None) -> list[dict[str, Any]]:
    """Two or three runs of layers that may overlap; the sources' runs may lie at different depths."""
    pieces = []
    for _ in range(draw.randint(2, 3)):
        length = draw.randint(1, LAYERS - 1)
        common = draw.randint(0, LAYERS - length)
        apart = draw.random() < 0.25
        sources = []
        for entry in [*entries, *([{"model": base}] if base else [])]:
            start = draw.randint(0, LAYERS - length) if apart else common
            sources.append({"model": entry["model"], "layer_range": [start, start + length], **entry})
        pieces.append({"sources": sources})
    return pieces


def random_case(method: str, seed: int, dtype: torch.dtype, spread: float) -> tuple[Any, ...]:
    """(method, tensors, base, parameters, seed)."""
    draw = random.Random(f"{method} {seed}")
    shape = draw.choice(SHAPES)
    least, most = (1, 1) if method in ("slerp", "nearswap", "arcee_fusion", "passthrough") else (2, 4)
    count = 2 if method == "nuslerp" else draw.randint(least, most)
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.5
    tensors = [(base + spread * torch.randn(shape, generator=generator)).to(dtype) for _ in range(count)]
    number = lambda low, high: round(draw.uniform(low, high), 3)  # noqa: E731
    parameters: dict[str, Any] = {}
    if method in ARITHMETIC or method in ("linear", "nuslerp", "multislerp"):
        parameters["weight"] = [number(0.1, 1.2) for _ in tensors]
    if method in ARITHMETIC:
        parameters |= {"normalize": draw.random() < 0.5, "lambda": number(0.4, 1.4)}
    if method in ARITHMETIC and method != "task_arithmetic":
        low, high = (0.3, 0.7) if method.startswith("della") else (0.05, 1.0)
        parameters["density"] = [number(low, high) for _ in tensors]
    if method.startswith("della"):
        parameters["epsilon"] = [number(0.02, 0.2) for _ in tensors]
    if method == "ties" or method.startswith("breadcrumbs"):
        parameters["rescale"] = draw.random() < 0.3
    if method.startswith("breadcrumbs"):
        parameters["gamma"] = [number(0, 0.2) for _ in tensors]
    if method in ("slerp", "nearswap"):
        parameters["t"] = number(0, 1)
    if method == "sce":
        parameters["select_topk"] = number(0.05, 1)
    if method.startswith("ram"):
        parameters["epsilon"] = draw.choice([1e-5, 0.3 * spread])
    based = method in ("slerp", "nearswap", "arcee_fusion", *BASED) or (
        method in ("nuslerp", "multislerp") and draw.random() < 0.5
    )
    return method, tensors, base.to(dtype) if based else None, parameters, seed
