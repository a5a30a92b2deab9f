"""The Patch as a value and as a file: algebra, identity, overlay, refusals."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from gnomon.errors import PatchError, WrongBase
from gnomon.models.low_rank import product
from gnomon.models.patch import Delta, Dense, LowRank, Patch, Sparse
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

DOWN = "model.layers.1.mlp.down_proj.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def random_delta(kind: str, shape: tuple[int, int], seed: int, rank: int = 3) -> Delta:
    g = torch.Generator().manual_seed(seed)
    if kind == "low-rank":
        return LowRank(torch.randn(shape[0], rank, generator=g) * 0.1, torch.randn(rank, shape[1], generator=g) * 0.1)
    if kind == "sparse":
        size = shape[0] * shape[1]
        indices = torch.randperm(size, generator=g)[: size // 10].sort().values
        return Sparse(indices, torch.randn(len(indices), generator=g), shape)
    return Dense(torch.randn(shape, generator=g) * 0.1)


def patch_for(base: str, seed: int = 0, kinds: tuple[str, str] = ("low-rank", "low-rank")) -> Patch:
    deltas = {DOWN: random_delta(kinds[0], (48, 80), seed), QUERY: random_delta(kinds[1], (64, 48), seed + 1)}
    return Patch(deltas, base, {"method": "random", "seed": seed})


@pytest.fixture(scope="module")
def base(tiny_dir: Path):
    return open_checkpoint(tiny_dir)


def test_an_applied_patch_adds_its_deltas_and_leaves_every_other_tensor_alone(base) -> None:
    patch = patch_for(base.identity)
    seen = patch.apply(base)
    for name in base:
        expected = base[name] + patch.dense(name) if name in patch.deltas else base[name]
        assert torch.equal(seen[name], expected)
    assert not torch.equal(seen[DOWN], base[DOWN])


def test_reverting_gives_the_very_same_checkpoint_back_wherever_the_patch_lies(base) -> None:
    a, b = patch_for(base.identity, 1), patch_for(base.identity, 5)
    assert a.revert(a.apply(base)) is base
    both = b.apply(a.apply(base))
    left = a.revert(both)
    assert left.identity == b.apply(base).identity
    assert torch.equal(left[DOWN], b.apply(base)[DOWN])
    with pytest.raises(PatchError, match="does not wear"):
        a.revert(left)


def test_a_patch_made_on_a_patched_model_cannot_lose_what_lies_under_it(base) -> None:
    a = patch_for(base.identity, 1)
    b = patch_for(a.apply(base).identity, 2)
    with pytest.raises(WrongBase):
        a.revert(b.apply(a.apply(base)))
    assert (a + b).base == base.identity


def test_identity_is_derived_without_reading_a_weight(base, monkeypatch: pytest.MonkeyPatch) -> None:
    patch = patch_for(base.identity)
    seen = patch.apply(base)
    known = base.identity
    monkeypatch.setattr(type(base), "__getitem__", lambda *_: pytest.fail("a tensor was read"))
    assert seen.identity not in (known, patch.identity)
    assert seen.identity == patch.apply(base).identity
    assert patch_for(base.identity, 9).apply(base).identity != seen.identity


def test_identity_depends_on_deltas_and_base_and_on_nothing_else(base) -> None:
    patch = patch_for(base.identity)
    assert patch.with_report(score=1.0).identity == patch.identity
    assert Patch(patch.deltas, "0" * 64).identity != patch.identity
    nudged = dict(patch.deltas)
    up = patch.deltas[DOWN].up.clone()  # type: ignore[union-attr]
    up[0, 0] = torch.nextafter(up[0, 0], torch.tensor(9.0))
    nudged[DOWN] = LowRank(up, patch.deltas[DOWN].down)  # type: ignore[union-attr]
    assert Patch(nudged, base.identity).identity != patch.identity


def test_a_bfloat16_weight_stays_bfloat16(tmp_path: Path) -> None:
    folder = write_tiny_model(tmp_path / "m")
    tensors = {name: t.to(torch.bfloat16) for name, t in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors")
    checkpoint = open_checkpoint(folder)
    patch = patch_for(checkpoint.identity)
    seen = patch.apply(checkpoint)[DOWN]
    assert seen.dtype == torch.bfloat16
    assert torch.equal(seen, (tensors[DOWN].float() + patch.dense(DOWN)).to(torch.bfloat16))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from(["low-rank", "sparse", "dense"]), min_size=4, max_size=4),
    st.integers(0, 1000),
    st.floats(-3, 3, allow_nan=False, width=32),
)
def test_the_algebra_of_patches_is_that_of_their_deltas(kinds: list[str], seed: int, factor: float) -> None:
    a = patch_for("b", seed, (kinds[0], kinds[1]))
    b = patch_for("b", seed + 50, (kinds[2], kinds[3]))
    for name in (DOWN, QUERY):
        torch.testing.assert_close((a + b).dense(name), a.dense(name) + b.dense(name), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close((a * factor).dense(name), a.dense(name) * factor, rtol=1e-5, atol=1e-6)
        assert torch.equal((-a).dense(name), -a.dense(name))
        torch.testing.assert_close((a - b).dense(name), a.dense(name) - b.dense(name), rtol=1e-5, atol=1e-6)
    negated = -a
    assert -negated == a
    both = all(kind == "low-rank" for kind in kinds)
    assert (a + b).is_low_rank == both
    if both:
        assert (a + b).rank == 6


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.sampled_from(["low-rank", "sparse", "dense"]), min_size=2, max_size=2),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(), st.lists(st.booleans())), max_size=3),
)
def test_a_saved_patch_comes_back_the_same_and_saving_again_gives_the_same_bytes(
    tmp_path_factory: pytest.TempPathFactory, kinds: list[str], dtype: torch.dtype, about: dict
) -> None:
    folder = tmp_path_factory.mktemp("p")
    first = patch_for("b" * 64, 3, (kinds[0], kinds[1]))
    deltas: dict[str, Delta] = {}
    for name, d in first.deltas.items():
        if isinstance(d, LowRank):
            deltas[name] = LowRank(d.up.to(dtype), d.down.to(dtype))
        else:
            deltas[name] = d
    patch = Patch(deltas, first.base, {"m": about}, {"r": about}, {"memory": torch.eye(3)})
    patch.save(folder / "a.patch.safetensors")
    again = Patch.load(folder / "a.patch.safetensors")
    assert again == patch
    assert (again.metadata, again.report) == (patch.metadata, patch.report)
    assert torch.equal(again.attachments["memory"], torch.eye(3))
    assert [d.kind for d in again.deltas.values()] == [d.kind for d in patch.deltas.values()]
    again.save(folder / "b.patch.safetensors")
    assert (folder / "a.patch.safetensors").read_bytes() == (folder / "b.patch.safetensors").read_bytes()


def test_compression_is_the_best_of_its_rank_and_says_what_it_lost() -> None:
    patch = patch_for("b", 0, ("dense", "sparse"))
    values = torch.linalg.svdvals(patch.dense(DOWN).double())
    small = patch.to_low_rank(rank=10)
    assert small.rank == 10
    best = float((values[10:] ** 2).sum().sqrt() / (values**2).sum().sqrt())
    assert small.report["relative_error"][DOWN] == pytest.approx(best, rel=1e-4)
    assert patch.to_low_rank(energy=1.0).report["relative_error"][DOWN] < 1e-5
    half = patch.to_low_rank(energy=0.5).report["relative_error"][DOWN]
    assert half <= 0.5**0.5 + 1e-6


def test_stacked_low_rank_patches_compress_to_their_true_rank() -> None:
    a = patch_for("b", 0)
    twice = (a + a).to_low_rank(energy=1.0)
    assert twice.rank == 3
    torch.testing.assert_close(twice.dense(DOWN), 2 * a.dense(DOWN), rtol=1e-4, atol=1e-6)


def test_vectors_have_no_rank_and_the_error_says_what_to_do() -> None:
    patch = Patch({NORM: Dense(torch.ones(48)), DOWN: random_delta("dense", (48, 80), 0)}, "b")
    with pytest.raises(PatchError, match=r"model\.norm\.weight.*only"):
        patch.to_low_rank(rank=2)
    assert patch.only("down_proj").to_low_rank(rank=2).is_low_rank


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused_when_the_delta_is_made(value: float) -> None:
    bad = torch.zeros(4, 4)
    bad[1, 1] = value
    for make in (
        lambda: Dense(bad),
        lambda: LowRank(bad, torch.zeros(4, 5)),
        lambda: LowRank(torch.zeros(3, 4), bad),
        lambda: Sparse(torch.tensor([0, 1, 2, 3]), bad[1], (2, 2)),
    ):
        with pytest.raises(PatchError, match="NaN or infinite"):
            make()


def test_malformed_deltas_are_refused_with_their_shapes() -> None:
    with pytest.raises(PatchError, match=r"\[4, 2\] and \[3, 4\]"):
        LowRank(torch.zeros(4, 2), torch.zeros(3, 4))
    with pytest.raises(PatchError, match="ascend"):
        Sparse(torch.tensor([1, 1]), torch.zeros(2), (2, 2))
    with pytest.raises(PatchError, match="ascend"):
        Sparse(torch.tensor([1, 4]), torch.zeros(2), (2, 2))
    with pytest.raises(PatchError, match="int64"):
        Sparse(torch.tensor([1, 2], dtype=torch.int32), torch.zeros(2), (2, 2))
    with pytest.raises(PatchError, match="floating"):
        Dense(torch.zeros(2, dtype=torch.int32))
    with pytest.raises(PatchError, match="without deltas"):
        Patch({}, "b")


def test_another_models_patch_is_refused_with_both_identities_unless_told(base, tmp_path: Path) -> None:
    other = open_checkpoint(write_tiny_model(tmp_path / "other", seed=1))
    patch = patch_for(other.identity)
    with pytest.raises(WrongBase, match=f"{other.identity[:16]}.*{base.identity[:16]}"):
        patch.apply(base)
    assert torch.equal(patch.apply(base, any_base=True)[DOWN], base[DOWN] + patch.dense(DOWN))
    with pytest.raises(PatchError, match="different bases"):
        _ = patch + patch_for(base.identity)


def test_a_delta_that_fits_no_tensor_is_refused_by_name(base) -> None:
    with pytest.raises(PatchError, match=r"no tensor `model\.layers\.9\.x`"):
        Patch({"model.layers.9.x": Dense(torch.zeros(2, 2))}, base.identity).apply(base)
    with pytest.raises(PatchError, match=r"\(48, 79\).*\(48, 80\)"):
        Patch({DOWN: Dense(torch.zeros(48, 79))}, base.identity).apply(base)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = patch_for("b").save(tmp_path / "a.patch.safetensors")
    whole = path.read_bytes()
    cases = {
        "cut": whole[:-5],
        "cut in the header": whole[:40],
        "empty": b"",
        "flipped": whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:],
        "no safetensors": b"\x80\x04pickle" * 10,
    }
    for what, content in cases.items():
        path.write_bytes(content)
        with pytest.raises(PatchError) as caught:
            Patch.load(path)
        assert str(path) in str(caught.value), what
    save_file({"x": torch.zeros(2)}, path)
    with pytest.raises(PatchError, match="is no patch"):
        Patch.load(path)
    with pytest.raises(PatchError, match="cannot be read"):
        Patch.load(tmp_path / "missing")


def test_metadata_that_is_no_json_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    patch = Patch({DOWN: random_delta("dense", (48, 80), 0)}, "b", {"method": object()})
    with pytest.raises(PatchError, match="JSON"):
        patch.save(tmp_path / "a.patch.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_save_leaves_the_old_file_whole(tmp_path: Path) -> None:
    old = patch_for("b", 1)
    path = old.save(tmp_path / "a.patch.safetensors")
    code = (
        "import sys, time, torch\n"
        "from gnomon.models.patch import Patch, Dense\n"
        "patch = Patch({'x': Dense(torch.ones(3000, 1000))}, 'b')\n"
        "print('ready', flush=True)\n"
        "while True: patch.save(sys.argv[1])\n"
    )
    new = Patch({"x": Dense(torch.ones(3000, 1000))}, "b")
    for delay in (0.0, 0.02, 0.05, 0.09):
        writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        try:
            writer.wait(delay or 0.001)
        except subprocess.TimeoutExpired:
            os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert Patch.load(path) in (old, new)


def test_a_low_rank_delta_has_the_same_bits_whatever_the_matrix_library_does(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    up, down = torch.randn(300, 9, generator=g), torch.randn(9, 400, generator=g)
    up[:50] = torch.tensor([1.0, 2.0**-24, 0, 0, 0, 0, 0, 0, 0])  # sums that lie between two float32 numbers
    down[:, :50] = 1.0
    expected = product(up, down)
    assert torch.equal(product(down.T, up.T).T, expected)
    matmul = torch.Tensor.__matmul__

    def sloppy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """As exact as a library must be, and no more."""
        noise = (torch.rand(a.shape[0], b.shape[1], generator=g) - 0.5) * 2.0**-52
        return matmul(a, b) + noise * 9 * matmul(a.abs(), b.abs())

    monkeypatch.setattr(torch.Tensor, "__matmul__", sloppy)
    for _ in range(5):
        assert torch.equal(product(up, down), expected)
    assert not torch.equal((up.double() @ down.double()).float(), expected)  # without the care it would show


@pytest.mark.parametrize("shape", [(40, 90), (90, 40), (50, 50)])
def test_a_compressed_delta_is_the_best_of_its_rank_by_torchs_own_decomposition(shape: tuple[int, int]) -> None:
    full = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    patch = Patch({DOWN: Dense(full)}, "0" * 64, {})
    up, values, down = torch.linalg.svd(full.double(), full_matrices=False)
    for rank in (1, 7, 40):
        best = (up[:, :rank] * values[:rank]) @ down[:rank]
        assert torch.allclose(patch.to_low_rank(rank=rank).dense(DOWN).double(), best, atol=2e-5)
    rank = int((torch.cumsum(values**2, 0) / (values**2).sum() < 0.9).sum()) + 1
    assert patch.to_low_rank(energy=0.9).rank == rank
