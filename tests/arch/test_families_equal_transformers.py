"""Our decoder against transformers' modules, family by family, on tiny random models in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.arch.decoder import Decoder
from gnomon.arch.network import build_network
from gnomon.errors import UnsupportedModel
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.batch import RaggedBatch, Span
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

transformers = pytest.importorskip("transformers")

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    (
        "llama",
        {
            "rope_scaling": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}}),
    ("mistral", {}),
    ("mistral", {"sliding_window": None, "head_dim": 12}),
    ("qwen2", {"tie_word_embeddings": True}),
    ("qwen3", {"head_dim": 24}),
    ("gemma3", {}),
    ("gemma3", {"final_logit_softcapping": 30.0}),
]


@pytest.mark.parametrize("kernel", ["torch", "native"])
@pytest.mark.parametrize(("family", "overrides"), CASES, ids=lambda value: str(value)[:40])
def test_logits_equal_transformers_in_ragged_chunks(
    family: str, overrides: dict[str, Any], kernel: str, tmp_path: Path
) -> None:
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    folder = write_tiny_model(tmp_path / "m", family, **overrides)
    reference = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.randint(3, 290, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        expected = reference(torch.tensor([ids])).logits[0]
    checkpoint = open_checkpoint(folder)
    network = build_network(checkpoint, make_operators("fp32", kernel=kernel, threads=1))
    pages = network.new_pages(8)
    rows = []
    start = 0
    for size in (1, 63, 2, 70, 14):
        stranger = Span(9, ids[3 : 3 + size], 0, [6, 7], "none")
        batch = RaggedBatch.build([stranger, Span(1, ids[start : start + size], start, [4, 1, 5], "all")])
        rows.append(network.logits(network.forward(batch, pages)[batch.wanted_rows_R]))
        start += size
    ours = torch.cat(rows)
    assert (ours - expected).abs().max() <= 2e-4 * expected.std()
    assert torch.equal(ours.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize(("family", "overrides"), CASES, ids=lambda value: str(value)[:40])
def test_layers_in_one_call_equal_the_operators_one_by_one(
    family: str, overrides: dict[str, Any], dtype: str, tmp_path: Path
) -> None:
    if (reason := native_reason()) is not None:
        pytest.skip(reason)
    checkpoint = open_checkpoint(write_tiny_model(tmp_path / "m", family, **overrides))
    network = build_network(checkpoint, make_operators(dtype, kernel="native", threads=2))
    assert isinstance(network, Decoder) and network.run_layers is not None
    ids = torch.randint(3, 290, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    results = []
    for run in (network.run_layers, None):
        network.run_layers = run
        pages = network.new_pages(8)
        for start, size in ((0, 64), (64, 3), (67, 83)):
            spans = [
                Span(9, ids[:size], 0, [6, 7], "none"),
                Span(1, ids[start : start + size], start, [4, 1, 5], "all"),
            ]
            results.append(network.forward(RaggedBatch.build(spans), pages).numpy().tobytes())
    assert results[:3] == results[3:]


def test_an_unknown_rotary_scaling_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", rope_scaling={"rope_type": "longrope", "factor": 2.0})
    with pytest.raises(UnsupportedModel, match="longrope"):
        build_network(open_checkpoint(folder), make_operators("fp32", kernel="torch"))


def test_a_network_that_nobody_knows_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", architectures=["FrobnicatorForCausalLM"])
    with pytest.raises(UnsupportedModel, match="FrobnicatorForCausalLM"):
        build_network(open_checkpoint(folder), make_operators("fp32", kernel="torch"))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m", num_hidden_layers=4)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5'))
    with pytest.raises(Exception, match=r"model\.layers\.4\."):
        build_network(open_checkpoint(folder), make_operators("fp32", kernel="torch"))
