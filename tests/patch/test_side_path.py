"""Patches beside the weights: what they compute, and that nobody's bits depend on anybody else's patches. Exact."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter

from gnomon.arch.network import Network, build_network
from gnomon.engine.engine import Engine
from gnomon.engine.request import SamplingParams
from gnomon.engine.runner import PagedRunner
from gnomon.errors import PatchError
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.batch import RaggedBatch, Span
from gnomon.kernels.side import SidePath
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch import Patch
from gnomon.models.reference import open_checkpoint
from helpers.patches import PROJECTIONS, random_patch
from helpers.schedules import Patches, Record, Seen, compare_schedule
from helpers.tiny import write_tiny_model

IDS = [5, 9, 17, 250, 33, 8, 120, 44, 7, 7, 9]


def network_of(folder: Path | Checkpoint, kind: str, threads: int = 1) -> Network:
    dtype, kernel = kind.split()
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    checkpoint = open_checkpoint(folder) if isinstance(folder, Path) else folder
    return build_network(checkpoint, make_operators(dtype, kernel=kernel, threads=threads))


def side_of(network: Network, patch: Patch) -> SidePath:
    return network.side_path({name: (d.up, d.down) for name, d in patch.deltas.items()})  # type: ignore[union-attr]


def logits(network: Network, ids: list[int], *paths: SidePath) -> torch.Tensor:
    pages = network.new_pages(4)
    batch = RaggedBatch.build([Span(1, ids, 0, [2, 0], "all", paths)])
    hidden = network.forward(batch, pages)
    return network.logits(hidden[batch.wanted_rows_R], batch.wanted_side_rows)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_the_side_path_computes_what_the_patched_weights_compute(family: str, kernel: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    checkpoint = open_checkpoint(folder)
    patch = random_patch(checkpoint, 1)
    network = network_of(folder, f"fp32 {kernel}")
    beside = logits(network, IDS, side_of(network, patch))
    inside = logits(network_of(patch.apply(checkpoint), f"fp32 {kernel}"), IDS)
    plain = logits(network, IDS)
    scale = float((inside - plain).abs().max())
    assert scale > 0.1
    assert float((beside - inside).abs().max()) < 2e-4 * scale


@pytest.mark.parametrize("name", [*PROJECTIONS, "embed_tokens", "lm_head"])
def test_every_single_tensor_can_be_patched(name: str, tiny_dir: Path) -> None:
    checkpoint = open_checkpoint(tiny_dir)
    patch = random_patch(checkpoint, 2, parts=(name,))
    network = network_of(tiny_dir, "fp32 native")
    beside, plain = logits(network, IDS, side_of(network, patch)), logits(network, IDS)
    inside = logits(network_of(patch.apply(checkpoint), "fp32 native"), IDS)
    assert not torch.equal(beside, plain)
    assert torch.allclose(beside, inside, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["fp32 native", "bf16 native", "int8 native"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_one_native_call_and_the_operators_one_by_one_give_the_same_bits(
    kind: str, family: str, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    network = network_of(folder, kind, threads=2)
    path, other = (
        side_of(network, random_patch(open_checkpoint(folder), seed, rank)) for seed, rank in ((1, 5), (2, 17))
    )
    ids = IDS * 5
    whole = logits(network, ids, path, other)
    assert network.run_layers is not None  # type: ignore[attr-defined]
    network.run_layers = None  # type: ignore[attr-defined]
    assert torch.equal(logits(network, ids, path, other), whole)
    assert not torch.equal(logits(network, ids, other, path), whole)  # the order counts, as the fingerprint says


def two_patches(network: Network, folder: Path) -> list[Patches]:
    """Nothing, one, another, both, and both the other way round."""
    checkpoint = open_checkpoint(folder)
    a = side_of(network, random_patch(checkpoint, 1, rank=3))
    b = side_of(network, random_patch(checkpoint, 2, rank=16, parts=("v_proj", "down_proj", "embed")))
    return [{}, {"a": a}, {"b": b}, {"a": a, "b": b}, {"b": b, "a": a}]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    ("kind", "count"),
    [("fp32 native", 16), ("bf16 native", 16), ("int8 native", 16), ("fp32 torch", 6), ("bf16 torch", 6)],
)
def test_patched_and_unpatched_requests_of_one_batch_equal_their_solo_runs(
    family: str, kind: str, count: int, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    seen = Seen()
    for threads in (1, 2) if kind.endswith("native") else (1,):
        network = network_of(folder, kind, threads)
        patches = two_patches(network, folder)
        for seed in range(count // 2):
            compare_schedule(network, 5000 * threads + seed, seen, patches=patches)
    assert seen.different == []
    assert seen.largest_batch >= 2
    if kind.endswith("native"):
        assert seen.largest_batch >= 3
        assert seen.preemptions > 0 and seen.hits > 0 and seen.chunked > 0 and seen.accepted > 0


def test_a_neighbours_patch_changes_no_bit_and_ones_own_changes_many(tiny_dir: Path) -> None:
    network = network_of(tiny_dir, "fp32 native")
    path = side_of(network, random_patch(open_checkpoint(tiny_dir), 1))
    pages = network.new_pages(8)
    spans = [Span(1, IDS, 0, [0], "all"), Span(2, IDS, 0, [1], "all", (path,)), Span(3, IDS, 0, [2], "all")]
    batch = RaggedBatch.build(spans)
    rows = network.logits(network.forward(batch, pages)[batch.wanted_rows_R], batch.wanted_side_rows)
    first, second, third = torch.split(rows, len(IDS))
    plain = logits(network, IDS)
    assert torch.equal(first, plain) and torch.equal(third, plain)
    assert torch.equal(second, logits(network, IDS, path))
    assert (second != plain).float().mean() > 0.99


def test_a_defect_in_the_row_bookkeeping_would_be_seen(tiny_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mutation: the side path reaches one row too far into the neighbour."""
    network = network_of(tiny_dir, "fp32 native")
    patches = two_patches(network, tiny_dir)
    build = RaggedBatch.build

    def spoiled(spans: list[Span]) -> RaggedBatch:
        batch = build(spans)
        for index, group in enumerate(batch.side_rows):
            if group.end < len(batch.token_ids_T):
                object.__setattr__(batch.side_rows[index], "end", group.end + 1)
        return batch

    monkeypatch.setattr(RaggedBatch, "build", spoiled)
    seen = Seen()
    for seed in range(10):
        compare_schedule(network, seed, seen, patches=patches)
    assert seen.different


def test_pages_are_shared_between_requests_of_the_same_patches_only(tiny_dir: Path) -> None:
    network = network_of(tiny_dir, "fp32 native")
    patches = two_patches(network, tiny_dir)
    engine = Engine(PagedRunner(network, page_count=32))
    hits = []
    for number, chosen in enumerate([*patches, *patches]):
        record = Record()
        params = SamplingParams(seed=1, max_tokens=3, logprobs=1)
        engine.submit(record.request(number, [7, 8, 9, 10] * 20, params, 0, chosen))
        while engine.step():
            pass
        hits.append((record.finished[0].cached_tokens, record.events))
    assert [hit for hit, _ in hits] == [0] * 5 + [64] * 5
    assert [events for _, events in hits[:5]] == [events for _, events in hits[5:]]
    assert len({str(events) for _, events in hits[:5]}) == 5


def test_the_sentinel_repeats_a_patched_request_with_its_patches(tiny_dir: Path) -> None:
    network = network_of(tiny_dir, "fp32 native")
    patches = two_patches(network, tiny_dir)
    engine = Engine(PagedRunner(network, page_count=32), sentinel_every=1)
    for number, chosen in enumerate(patches):
        engine.submit(Record().request(number, [7, 8, 9] * 9, SamplingParams(seed=1, max_tokens=4), 0, chosen))
    while engine.step():
        pass
    assert (engine.sentinel.replays, engine.sentinel.mismatches) == (5, 0)


def test_norms_and_biases_cannot_run_beside_the_weights(tiny_dir: Path) -> None:
    network = network_of(tiny_dir, "fp32 native")
    with pytest.raises(PatchError, match=r"model\.norm\.weight.*gnomon\.load"):
        network.side_path({"model.norm.weight": (torch.ones(48, 1), torch.ones(1, 1))})


def write_gguf(folder: Path, path: Path) -> Path:
    """A tiny Llama as Q8_0 blocks."""
    from gguf import GGMLQuantizationType, quants

    source = open_checkpoint(folder)
    config = source.config
    writer = GGUFWriter(path, "qwen2")
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(512)
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for name in source:
        stem, _, kind = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, index, part = stem.split(".", 3)
            stem = f"blk.{index}.{parts[part]}"
        else:
            stem = names[stem]
        values = source[name].numpy()
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            blocks = quants.quantize(values, GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{stem}.{kind}", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{stem}.{kind}", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_blocks_stay_packed_under_a_side_path(tmp_path: Path) -> None:
    folder = write_tiny_model(
        tmp_path / "m", "qwen2", hidden_size=64, intermediate_size=96, num_key_value_heads=2, num_attention_heads=4
    )
    checkpoint = open_checkpoint(write_gguf(folder, tmp_path / "m.gguf"))
    network = network_of(checkpoint, "gguf native")
    patch = random_patch(checkpoint, 1)
    path = side_of(network, patch)
    beside, plain = logits(network, IDS, path), logits(network, IDS)
    exact = logits(network_of(patch.apply(checkpoint), "fp32 native"), IDS)
    base = logits(network_of(checkpoint, "fp32 native"), IDS)
    change = (exact - base).norm()
    assert ((beside - plain) - (exact - base)).norm() < 0.2 * change
    seen = Seen()
    for seed in range(10):
        compare_schedule(network, seed, seen, patches=[{}, {"a": path}])
    assert seen.different == [] and seen.hits > 0 and seen.largest_batch >= 3
