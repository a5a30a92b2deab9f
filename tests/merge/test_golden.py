"""Golden rows of mergekit 0.1.5 (fp32, CPU), recorded in the test data beside the project."""

from __future__ import annotations

import csv
import json
import math
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from gnomon.merge import merge, method

WEIGHTS = [0.6, 0.3, 0.1]


def det(shape: tuple[int, ...], k: float) -> Tensor:
    """The recorded rows' input: no random numbers, float64."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return (torch.sin(i * (0.37 + 0.11 * k) + k) * (1 + 0.25 * torch.cos(0.017 * i * (k + 1)))).reshape(shape)


BASE = 0.5 * det((4, 6), 0)
A, C, D = ((BASE + scale * det((4, 6), k)).float() for k, scale in ((1, 0.1), (2, 0.08), (3, 0.05)))
B = BASE.float()
THREE = [A, C, D]
CASES: dict[str, list[Callable[[], Tensor]]] = {
    "linear": [lambda: method("linear")(THREE, weight=WEIGHTS)],
    "task_arithmetic": [lambda: method("task_arithmetic")(THREE, base=B, weight=WEIGHTS)],
    "ties d=.5": [lambda: method("ties")(THREE, base=B, weight=WEIGHTS, density=0.5)],
    "breadcrumbs": [lambda: method("breadcrumbs")(THREE, base=B, weight=WEIGHTS, density=0.7, gamma=0.1)],
    "dare_ties": [lambda: method("dare_ties")(THREE, base=B, weight=WEIGHTS, density=0.5, seed=42, compat=True)],
    "della": [lambda: method("della")(THREE, base=B, weight=WEIGHTS, density=0.5, epsilon=0.15, seed=42, compat=True)],
    "slerp": [lambda: method("slerp")([C], base=A, t=0.35)],
    "nuslerp": [lambda: method("nuslerp")([A, C], base=B, weight=[0.65, 0.35])],
    "multislerp": [
        lambda: method("multislerp")(THREE, weight=WEIGHTS),
        lambda: method("multislerp")(THREE, base=B, weight=WEIGHTS),
    ],
    "model_stock": [
        lambda: method("model_stock")(THREE, base=B),
        lambda: method("model_stock")(THREE, base=B, filter_wise=True),
    ],
    "nearswap": [lambda: method("nearswap")([A], base=B, t=0.02)],
    "ram": [
        lambda: method("ram")(THREE, base=B, epsilon=0.05),
        lambda: method("ramplus_tl")(THREE, base=B, epsilon=0.05),
    ],
}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_every_recorded_tensor_row_is_met_to_six_digits(data: Path) -> None:
    recorded = rows(data / "merge-ensemble" / "golden_tensor_cases.csv")
    assert len(recorded) == 12
    for row in recorded:
        runs = next(CASES[name] for name in sorted(CASES, key=len, reverse=True) if row["case"].startswith(name))
        for place, run in enumerate(runs):
            got = run().double()
            found = [float(x) for x in (got.sum(), got.norm(), got[0, 0], got[3, 5])]
            wanted = [float(row[key].split(" / ")[place if " / " in row[key] else 0]) for key in ("sum", "l2", "x00")]
            wanted.append(float(row["x35"].split(" / ")[place if " / " in row["x35"] else 0]))
            assert found == pytest.approx(wanted, rel=1e-6, abs=1e-7), row["case"]


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "tie_word_embeddings": False, "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def write_recorded_model(path: Path, k: int) -> Path:
    """Model Pk of the end-to-end rows."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (64, 32), "model.norm.weight": (32,), "lm_head.weight": (64, 32)
    }  # fmt: skip
    parts = {"q": (32, 32), "k": (16, 32), "v": (16, 32), "o": (32, 32)}
    for layer in range(4):
        at = f"model.layers.{layer}"
        shapes |= {f"{at}.self_attn.{part}_proj.weight": shape for part, shape in parts.items()}
        shapes |= {f"{at}.mlp.{part}_proj.weight": (48, 32) for part in ("gate", "up")}
        shapes |= {f"{at}.mlp.down_proj.weight": (32, 48)}
        shapes |= {f"{at}.{part}_layernorm.weight": (32,) for part in ("input", "post_attention")}
    tensors = {}
    for name, shape in shapes.items():
        c = (zlib.crc32(name.encode()) % 997) / 997
        weight = 0.5 * det(shape, c)
        tensors[name] = (weight + 0.02 * k * det(shape, k + c) if k else weight).float()
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps(CONFIG))
    return path


def test_every_recorded_end_to_end_row_is_met(data: Path, tmp_path: Path) -> None:
    p = [str(write_recorded_model(tmp_path / f"P{k}", k)) for k in range(4)]
    by_mlp = [{"filter": "mlp", "value": 0.5}, {"value": 0}]
    filtered = [{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 0.25}, {"value": 0.6}]
    files = {
        "e1": {
            "merge_method": "linear",
            "models": [
                {"model": p[1], "parameters": {"weight": filtered}},
                {"model": p[2], "parameters": {"weight": 0.4}},
            ],
        },
        "e2": {
            "merge_method": "ties",
            "base_model": p[0],
            "models": [
                {"model": p[1], "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}},
                {"model": p[2], "parameters": {"density": 0.5, "weight": [0, 0.3, 0.7, 1]}},
                {"model": p[3], "parameters": {"density": 0.33, "weight": by_mlp}},
            ],
            "parameters": {"normalize": True, "int8_mask": True},
        },
        "e6": {"merge_method": "model_stock", "base_model": p[0], "models": [{"model": m} for m in p[1:]]},
    }
    for row in rows(data / "merge-ensemble" / "golden_end_to_end.csv"):
        file = tmp_path / f"{row['id']}.yaml"
        file.write_text(yaml.safe_dump(files[row["id"]], sort_keys=False))
        merged = merge(file)
        tensors = {name: merged[name].double() for name in merged}
        layers = "model.layers"
        named = {
            "embed": "model.embed_tokens.weight", "L0.q": f"{layers}.0.self_attn.q_proj.weight",
            "L1.down": f"{layers}.1.mlp.down_proj.weight", "L3.o": f"{layers}.3.self_attn.o_proj.weight",
            "norm": "model.norm.weight", "lm_head": "lm_head.weight",
        }  # fmt: skip
        assert len(tensors) == int(row["#"])
        total = math.fsum(float(t.sum()) for t in tensors.values())
        norm = math.sqrt(math.fsum(float(t.square().sum()) for t in tensors.values()))
        assert [total, norm] == pytest.approx([float(row["Σ"]), float(row["L2"])], abs=6e-6), row["id"]
        for column, name in named.items():
            assert float(tensors[name].norm()) == pytest.approx(float(row[column]), abs=1e-6), (row["id"], name)
