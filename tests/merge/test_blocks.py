"""The rules below the methods: selection, draws, sums."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import gnomon.merge.blocks
import gnomon.merge.select
from gnomon.errors import MergeError, UsageError
from gnomon.merge import method
from gnomon.merge.blocks import TensorView, tensor_reader
from gnomon.merge.randomness import CounterRandomness
from gnomon.merge.registry import methods
from gnomon.merge.select import Cut, Scores, greatest


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks of 64 numbers and samples of 32, so that tiny tensors have many."""
    monkeypatch.setattr(gnomon.merge.blocks, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(gnomon.merge.select, "SAMPLE", 32)
    yield


def view_of(values: torch.Tensor, threads: int = 1) -> TensorView:
    flat = [tensor_reader(values)]
    return TensorView("t", tuple(values.shape), flat, None, torch.float32, CounterRandomness(0), threads=threads)


def kept(view: TensorView, cut: Cut) -> torch.Tensor:
    return torch.cat(
        [cut.mask(b.models_RC[0].abs(), b.start).reshape(-1) for b in map(view.block, range(view.block_count()))]
    )


@given(
    seed=st.integers(0, 10_000), rows=st.integers(1, 60), columns=st.integers(1, 9),
    levels=st.sampled_from([1, 2, 5, 0]), share=st.floats(0, 1),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_the_k_greatest_are_those_of_a_stable_sort_ties_included(
    seed: int, rows: int, columns: int, levels: int, share: float
) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    if levels:
        values = (values * levels).round()
    keep = round(share * values.numel())
    view = view_of(values)
    mask = kept(view, greatest(view, Scores(lambda b: [b.models_RC[0].abs()]), [keep])[0])
    order = values.abs().reshape(-1).argsort(descending=True, stable=True)
    wanted = torch.zeros(values.numel(), dtype=torch.bool)
    wanted[order[:keep]] = True
    assert torch.equal(mask, wanted)


@given(start=st.integers(0, 100), count=st.integers(1, 60), model=st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_a_draw_depends_on_seed_tensor_model_and_element_alone(start: int, count: int, model: int) -> None:
    whole = CounterRandomness(3).words("a.weight", model, 0, 200)
    part = CounterRandomness(3).words("a.weight", model, start, count)
    assert (part == whole[start : start + count]).all()
    others = [(4, "a.weight", model), (3, "b.weight", model), (3, "a.weight", model + 1)]
    assert all((CounterRandomness(s).words(n, m, 0, 200) != whole).any() for s, n, m in others)


def test_the_share_kept_lies_within_four_standard_deviations() -> None:
    for density in (0.1, 0.5, 0.9):
        shape = torch.Size([200_000])
        mean = float(CounterRandomness(7).keep("x", 0, 0, density, shape).float().mean())
        assert abs(mean - density) < 4 * (density * (1 - density) / 200_000) ** 0.5


def parameters(name: str) -> dict[str, object]:
    schema = methods()[name].parameters
    given = {"weight": 0.5, "t": 0.3, "density": 0.6, "epsilon": 0.1 if "della" in name else 0.01}
    return {key: value for key, value in given.items() if key in schema}


@pytest.mark.parametrize("name", sorted(n for n, m in methods().items() if m.learned is None))
def test_no_method_depends_on_threads_and_every_one_gives_the_same_again(name: str) -> None:
    found = methods()[name]
    count = found.sources[1] if found.sources[1] is not None else 3
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(40, 12, generator=generator)
    tensors = [base + 0.1 * torch.randn(40, 12, generator=generator) for _ in range(count)]
    given = base if found.base != "ignored" else None
    runs = [
        method(name)(tensors, base=given, seed=5, threads=threads, **parameters(name))  # type: ignore[arg-type]
        for threads in (1, 3, 1)
    ]
    assert torch.equal(runs[0], runs[1]) and torch.equal(runs[0], runs[2])
    assert runs[0].shape == base.shape and bool(runs[0].isfinite().all())


@pytest.mark.parametrize("name", ["ties", "dare_ties", "dare_linear", "della", "breadcrumbs", "breadcrumbs_ties"])
def test_density_one_is_the_untrimmed_method(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(30, 7, generator=generator)
    tensors = [base + torch.randn(30, 7, generator=generator) for _ in range(3)]
    plain = "task_arithmetic" if name in ("dare_linear", "breadcrumbs") else "ties"
    got = method(name)(tensors, base=base, weight=[1, 2, 3], density=1.0, normalize=True)
    assert torch.equal(got, method(plain)(tensors, base=base, weight=[1, 2, 3], normalize=True))


@pytest.mark.parametrize("name", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_rescale_brings_a_trimmed_task_vector_back_to_its_norm(name: str) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(30, 7, generator=generator)
    tensor = base + torch.randn(30, 7, generator=generator)
    for compat in (False, True):
        merged = method(name)([tensor], base=base, weight=1, density=0.3, rescale=True, compat=compat)
        plain = method(name)([tensor], base=base, weight=1, density=0.3, compat=compat)
        norm = float((tensor - base).abs().sum())
        assert float((merged - base).abs().sum()) == pytest.approx(norm, rel=1e-4)
        assert float((plain - base).abs().sum()) < 0.8 * norm


def test_the_expectation_of_a_dare_delta_is_the_delta() -> None:
    base, tensor = torch.zeros(50), torch.linspace(0.1, 1, 50)
    runs = [
        method("dare_linear")([tensor], base=base, weight=1, density=0.5, rescale="inverse_density", seed=seed)
        for seed in range(400)
    ]
    assert torch.allclose(torch.stack(runs).mean(0), tensor, atol=0.25)
    assert abs(float(torch.stack(runs).mean()) - float(tensor.mean())) < 0.02


def test_what_is_wrong_is_said_with_its_name_and_the_nearest_one() -> None:
    base, tensor = torch.zeros(4), torch.ones(4)
    with pytest.raises(MergeError, match="Did you mean `ties`"):
        method("tise")
    with pytest.raises(UsageError, match=r"no parameter `densty`.*Did you mean `density`"):
        method("ties")([tensor], base=base, weight=1, densty=0.5)
    with pytest.raises(UsageError, match=r"between 0 and 1, not 1\.5"):
        method("ties")([tensor], base=base, weight=1, density=1.5)
    with pytest.raises(UsageError, match="needs the parameter `weight`"):
        method("ties")([tensor], base=base)
    with pytest.raises(UsageError, match="needs a base model"):
        method("ties")([tensor], weight=1)
    with pytest.raises(MergeError, match="shapes differ"):
        method("ties")([torch.ones(5)], base=base, weight=1)
    with pytest.raises(MergeError, match="holds NaN or infinity"):
        method("linear")([torch.tensor([1.0, float("nan")])], weight=1)
    with pytest.raises(UsageError, match="exactly 1"):
        method("slerp")([tensor, tensor], base=base, t=0.5)


def test_half_types_are_computed_in_float32_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(20, 8, generator=generator).bfloat16()
    tensors = [(base.float() + torch.randn(20, 8, generator=generator)).bfloat16() for _ in range(3)]
    half = method("task_arithmetic")(tensors, base=base, weight=0.3)
    full = method("task_arithmetic")([t.float() for t in tensors], base=base.float(), weight=0.3)
    assert half.dtype is torch.bfloat16 and torch.equal(half, full.bfloat16())
