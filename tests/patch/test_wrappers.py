"""Wrappers: what each kind computes, that a row's bits are its own, and what a patch that holds them can be asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gnomon
from gnomon.arch.network import Network, build_network
from gnomon.errors import PatchError, WrongBase
from gnomon.kernels import make_operators, native_reason
from gnomon.kernels.batch import RaggedBatch, Span
from gnomon.kernels.side import SidePath
from gnomon.kernels.torch_operators import TorchOperators
from gnomon.kernels.wrappers import Affine, Site, make_wrapper
from gnomon.models.patch import Patch, Wrapper
from gnomon.models.patch.merging import merge_patches
from gnomon.models.reference import open_checkpoint
from helpers.patches import random_patch, random_wrappers
from helpers.schedules import Patches, Seen, compare_schedule
from helpers.tiny import write_tiny_model

IDS = [5, 9, 17, 250, 33, 8, 120, 44, 7, 7, 9]
C, M = 6, 10


def network_of(folder: Path, kind: str, threads: int = 1) -> Network:
    dtype, kernel = kind.split()
    if kernel == "native" and (reason := native_reason()) is not None:
        pytest.skip(reason)
    return build_network(open_checkpoint(folder), make_operators(dtype, kernel=kernel, threads=threads))


def logits(network: Network, ids: list[int], *paths: SidePath) -> torch.Tensor:
    batch = RaggedBatch.build([Span(1, ids, 0, [2, 0], "all", paths)])
    hidden = network.forward(batch, network.new_pages(4))
    return network.logits(hidden[batch.wanted_rows_R], batch.wanted_side_rows)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def around(kind: str, tensors: dict[str, torch.Tensor], site: Site, out_TC: torch.Tensor) -> torch.Tensor:
    wrapper = make_wrapper(kind, tensors)
    assert not isinstance(wrapper, Affine)
    return wrapper.around(site, out_TC, TorchOperators("fp32", 1))


SITE, OUT = Site(normal(4, C), normal(4, M)), normal(4, C)


def test_neurons_add_their_values_where_their_keys_answer() -> None:
    t = {"key": normal(3, C), "bias": normal(3), "value": normal(3, C)}
    added = torch.relu(SITE.normed_TC @ t["key"].T + t["bias"]) @ t["value"]
    assert torch.allclose(around("neurons", t, SITE, OUT), OUT + added, atol=1e-5)
    t["gate"] = normal(3, C) * 0.5
    added = (torch.nn.functional.silu(SITE.normed_TC @ t["gate"].T) * (SITE.normed_TC @ t["key"].T + t["bias"])) @ t[
        "value"
    ]
    assert torch.allclose(around("neurons", t, SITE, OUT), OUT + added, atol=1e-5)


def test_a_codebook_answers_within_the_radius_of_the_nearest_key_alone() -> None:
    keys = torch.stack([SITE.normed_TC[1] + 0.1, SITE.normed_TC[2] + 0.5, SITE.normed_TC[2] + 0.1])
    t = {"key": keys, "radius": torch.tensor([0.5, 9.0, 0.01]), "value": normal(3, C)}
    out = around("codebook", t, SITE, OUT)
    assert torch.equal(out[1], t["value"][0])
    # The nearest key's radius is too small, and the next one, which would reach, is not asked.
    assert torch.equal(out[2], OUT[2])


def test_a_side_memory_answers_where_it_differs_by_more_than_its_threshold() -> None:
    t = {"up": normal(C, 2), "down": normal(2, M)}
    added = SITE.inner_TM @ t["down"].T @ t["up"].T
    norms = added.norm(dim=1)
    t["threshold"] = norms.mean()[None]
    chosen = norms > norms.mean()
    assert chosen.any() and not chosen.all()
    expected = torch.where(chosen[:, None], OUT + added, OUT)
    assert torch.allclose(around("routed", t, SITE, OUT), expected, atol=1e-4)


def test_affine_changes_the_layers_output_and_may_be_a_vector_alone() -> None:
    t = {"left": normal(C, 2), "right": normal(2, C), "bias": normal(C)}
    affine, ops = make_wrapper("affine", t), TorchOperators("fp32", 1)
    assert isinstance(affine, Affine)
    assert torch.allclose(affine.added(OUT, ops), OUT @ t["right"].T @ t["left"].T + t["bias"], atol=1e-5)
    vector = make_wrapper("affine", {"left": torch.zeros(C, 0), "right": torch.zeros(0, C), "bias": t["bias"]})
    assert isinstance(vector, Affine) and torch.equal(vector.added(OUT, ops)[3], t["bias"])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize("kind", ["fp32 native", "bf16 native", "int8 native"])
def test_wrapped_and_plain_requests_of_one_batch_equal_their_solo_runs(family: str, kind: str, tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / family, family)
    checkpoint, seen = open_checkpoint(folder), Seen()
    network = network_of(folder, kind, threads=2)
    delta = random_patch(checkpoint, 1, rank=3)
    deltas = {name: (d.up, d.down) for name, d in delta.deltas.items()}  # type: ignore[union-attr]
    a = network.side_path({}, random_wrappers(checkpoint.config, 1))
    b = network.side_path(deltas, random_wrappers(checkpoint.config, 2, (0, 3)))
    patches: list[Patches] = [{}, {"a": a}, {"b": b}, {"a": a, "b": b}, {"b": b, "a": a}]
    for seed in range(6):
        compare_schedule(network, 7000 + seed, seen, patches=patches)
    assert seen.different == [] and seen.largest_batch >= 2


@pytest.mark.parametrize("layers", [(0,), (1, 2), (3,), (0, 1, 2, 3)])
def test_layers_between_wrapped_ones_run_in_one_native_call_with_the_same_bits(
    layers: tuple[int, ...], tiny_dir: Path
) -> None:
    network = network_of(tiny_dir, "fp32 native")
    checkpoint = open_checkpoint(tiny_dir)
    deltas = {n: (d.up, d.down) for n, d in random_patch(checkpoint, 1).deltas.items()}  # type: ignore[union-attr]
    path = network.side_path(deltas, random_wrappers(checkpoint.config, 1, layers))
    mixed = logits(network, IDS, path)
    assert not torch.equal(mixed, logits(network, IDS, network.side_path(deltas)))
    network.run_layers = None  # type: ignore[attr-defined]
    assert torch.equal(logits(network, IDS, path), mixed)


@pytest.fixture
def patch(tiny_dir: Path) -> Patch:
    checkpoint = open_checkpoint(tiny_dir)
    return Patch({}, checkpoint.identity, {"method": "test"}, wrappers=random_wrappers(checkpoint.config, 1))


def test_a_file_gives_back_what_was_written_and_the_name_says_what_it_is(patch: Patch, tmp_path: Path) -> None:
    again = Patch.load(patch.save(tmp_path / "wrapped.patch.safetensors"))
    assert again == patch and list(again.wrappers) == list(patch.wrappers) == patch.touches
    assert again.bytes == patch.bytes > 0 and again.is_low_rank and again.rank is None
    other = patch.wrappers["layers.1.affine"].scaled(2.0)
    assert Patch({}, patch.base, wrappers={**patch.wrappers, other.name: other}) != patch


def test_requests_name_it_the_fingerprint_says_so_and_taking_it_off_is_exact(patch: Patch, tiny_dir: Path) -> None:
    options: dict[str, Any] = {"max_tokens": 12, "temperature": 0.0, "logprobs": 1, "ignore_eos": True}
    with gnomon.load(tiny_dir, threads=1, ledger=False) as model:
        plain = model.generate("abc", **options)
        model.patches.add("worn", patch)
        worn = model.generate("abc", **options, patches=["worn"])
        view = model.with_patches([patch]).generate("abc", **options)
        assert (worn.token_ids, worn.logprobs) == (view.token_ids, view.logprobs)
        assert worn.logprobs != plain.logprobs and worn.fingerprint == view.fingerprint != plain.fingerprint
        after = model.generate("abc", **options)
        assert (after.token_ids, after.logprobs, after.fingerprint) == (
            plain.token_ids,
            plain.logprobs,
            plain.fingerprint,
        )
        with pytest.raises(WrongBase):
            model.patches.add("foreign", Patch({}, "0" * 64, wrappers=patch.wrappers))


def test_what_does_not_fit_or_cannot_be_is_refused_by_name(patch: Patch, tiny_dir: Path) -> None:
    network, checkpoint = network_of(tiny_dir, "fp32 torch"), open_checkpoint(tiny_dir)
    with pytest.raises(PatchError, match=r"layers\.9\.neurons.*layers 0\.\.3"):
        network.side_path({}, random_wrappers(checkpoint.config, 1, (9,)))
    narrow = {**checkpoint.config, "hidden_size": 8}
    with pytest.raises(PatchError, match=r"C = 8, not 48"):
        network.side_path({}, random_wrappers(narrow, 1))
    with pytest.raises(PatchError, match="no weights can hold it"):
        patch.apply(checkpoint)
    with pytest.raises(PatchError, match="cannot be scaled"):
        _ = -patch
    with pytest.raises(PatchError, match="TIES"):
        merge_patches([patch, patch.only("affine")], method="ties")
    with pytest.raises(PatchError, match="no wrapper of kind"):
        Wrapper("mystery", 0, {})
    with pytest.raises(PatchError, match="bias"):
        Wrapper("affine", 0, {"left": normal(C, 2), "right": normal(2, C), "bias": normal(C + 1)})
    with pytest.raises(PatchError, match="finite"):
        Wrapper("affine", 0, {"left": normal(C, 2), "right": normal(2, C), "bias": torch.full((C,), torch.nan)})


def test_wrappers_add_up(tiny_dir: Path) -> None:
    config, base = open_checkpoint(tiny_dir).config, open_checkpoint(tiny_dir).identity
    one, two = (Patch({}, base, wrappers=random_wrappers(config, seed)) for seed in (1, 2))
    with pytest.raises(PatchError, match="side memory"):
        _ = one + two
    both = (one.only("neurons") + two.only("neurons")).wrappers["layers.1.neurons"]
    assert both.sizes()["n"] == 14
    steered = one.only("layers.1.affine") + two.only("layers.1.affine") * -1.0
    bias = one.wrappers["layers.1.affine"].tensors["bias"] - two.wrappers["layers.1.affine"].tensors["bias"]
    assert torch.equal(steered.wrappers["layers.1.affine"].tensors["bias"], bias)
    book = (one.only("layers.1.codebook") + two.only("layers.1.codebook")).wrappers["layers.1.codebook"].tensors
    between = torch.cdist(book["key"][:5], book["key"][5:])
    assert bool((book["radius"][:5, None] + book["radius"][None, 5:] <= between + 1e-3).all())
