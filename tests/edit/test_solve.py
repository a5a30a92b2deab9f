"""The closed forms against golden numbers computed from the papers' equations alone, and against their own promises.

Golden rows: knowledge-editing specification, section 6 (numpy float64, made without any peer's code).
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gnomon.edit.protocols import ngram_entropy
from gnomon.edit.solve import (
    Factor,
    NullSpace,
    detector,
    equality,
    keep_relative,
    least_squares,
    null_space,
    rank_one,
    restrain,
    ridged,
)
from gnomon.errors import EditError


def wave(rows: int, columns: int, shift: float) -> Tensor:
    """F(r, c, s) of the specification."""
    return torch.tensor(
        [
            [
                math.sin(0.37 * i * j + shift) + 0.5 * math.cos(1.1 * i - 0.6 * j * (j + 1) + shift)
                for j in range(1, columns + 1)
            ]
            for i in range(1, rows + 1)
        ],
        dtype=torch.float64,
    )


WEIGHT = wave(3, 5, 1)
TEXT = wave(64, 5, 0.1)
MOMENT = TEXT.T @ TEXT / 64
KEY = wave(5, 1, 2)[:, 0]
VALUE = wave(3, 1, 3)[:, 0]
KEYS = wave(5, 4, 4)
RESIDUALS = wave(3, 4, 5)


def matches(delta: Tensor, total: float, norm: float, first: float, last: float) -> bool:
    found = (delta.sum(), delta.norm(), delta[0, 0], delta[2, 4])
    return all(
        math.isclose(float(a), b, rel_tol=1e-8, abs_tol=1e-9)
        for a, b in zip(found, (total, norm, first, last), strict=True)
    )


def rome(ridge: float) -> Tensor:
    left, right = rank_one(Factor.of(MOMENT, ridge), KEY, VALUE - WEIGHT @ KEY)
    return left @ right


def memit(share: float = 1.0) -> Tensor:
    left, right = least_squares(Factor.of(MOMENT, 0), KEYS, RESIDUALS * share, 2.0)
    return left @ right


def test_the_moment_has_the_golden_eigenvalues() -> None:
    expected = torch.tensor([0.39650825, 0.48766205, 0.52811352, 0.79434620, 1.47584609], dtype=torch.float64)
    assert torch.allclose(torch.linalg.eigvalsh(MOMENT), expected, atol=1e-8)


def test_rome_gives_the_golden_rows_with_and_without_ridge() -> None:
    assert matches(rome(0), 1.705962555, 3.596591110, -1.326444279, 0.378526359)
    assert matches(rome(1e-2), 1.691361077, 3.595752705, -1.327426934, 0.378654116)


def test_memit_gives_the_golden_rows_whole_and_for_the_first_of_three_layers() -> None:
    assert matches(memit(), 1.180958080, 0.919956555, 0.195629500, 0.136256361)
    assert matches(memit(1 / 3), 0.393652693, 0.306652185, 0.065209833, 0.045418787)


def test_memit_in_woodburys_form_is_the_direct_solve() -> None:
    direct = RESIDUALS @ KEYS.T @ torch.linalg.inv(2.0 * MOMENT + KEYS @ KEYS.T)
    assert torch.allclose(memit(), direct, rtol=0, atol=1e-12)


def test_alphaedit_gives_the_golden_row_and_leaves_the_retained_directions_alone() -> None:
    space = NullSpace.of(MOMENT, 0.30)
    assert space.basis_MN.shape[1] == 2
    assert math.isclose(space.energy, 0.24010211, rel_tol=1e-7)
    left, right = null_space(space, KEYS, RESIDUALS, 1.0)
    delta = left @ right
    assert matches(delta, 1.431692597, 0.944476849, 0.193394363, 0.058444097)
    retained = torch.linalg.eigh(MOMENT)[1][:, 2:]
    assert float((delta @ retained).abs().max()) < 1e-15


def test_rect_keeps_the_golden_entries() -> None:
    kept = keep_relative(memit(), WEIGHT, 0.4)
    assert int((kept != 0).sum()) == 6
    assert matches(kept, 0.294730135, 0.776287052, 0.0, 0.0)


def test_emmet_without_damping_meets_its_equality_constraints() -> None:
    left, right = equality(Factor.of(MOMENT, 0), KEYS, RESIDUALS, 0.0)
    assert torch.allclose(left @ right @ KEYS, RESIDUALS, atol=1e-10)


def test_emmet_of_one_fact_is_rome() -> None:
    left, right = equality(Factor.of(MOMENT, 0), KEY[:, None], (VALUE - WEIGHT @ KEY)[:, None], 0.0)
    assert torch.allclose(left @ right, rome(0), atol=1e-12)


def test_prune_leaves_small_singular_values_and_bends_large_ones() -> None:
    small = 0.01 * WEIGHT
    assert torch.allclose(restrain(small, WEIGHT), small, atol=1e-12)
    bent = restrain(50 * WEIGHT, WEIGHT)
    limit = float(torch.linalg.matrix_norm(WEIGHT, 2))
    assert math.isclose(float(torch.linalg.matrix_norm(bent, 2)), limit + math.log(50), rel_tol=1e-9)


def test_a_rank_deficient_moment_is_refused_without_and_solved_with_a_ridge() -> None:
    poor = torch.outer(KEY, KEY)
    with pytest.raises(EditError, match="cannot be inverted"):
        Factor.of(poor - 1e-3 * torch.eye(5, dtype=torch.float64), 0)
    left, right = rank_one(Factor.of(poor, 1e-4), KEY, VALUE)
    assert torch.allclose(left @ right @ KEY, VALUE, atol=1e-9)


def test_numbers_that_are_not_finite_are_refused() -> None:
    broken = MOMENT.clone()
    broken[0, 0] = float("nan")
    with pytest.raises(EditError):
        Factor.of(broken, 1e-3)
    with pytest.raises(EditError, match="not finite"):
        rank_one(Factor.of(MOMENT, 0), KEY, VALUE * float("inf"))


def test_a_null_space_without_or_with_every_direction_is_refused() -> None:
    for share in (1e-9, 1.0):
        with pytest.raises(EditError, match="of 5 directions"):
            NullSpace.of(MOMENT, share)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_every_rank_one_change_maps_its_key_to_its_value(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(20, 7, generator=generator, dtype=torch.float64)
    key, residual = torch.randn(7, generator=generator), torch.randn(3, generator=generator)
    left, right = rank_one(Factor.of(keys.T @ keys / 20, 1e-3), key, residual)
    assert torch.allclose((left @ right @ key.double()), residual.double(), atol=1e-9)


def test_the_ridge_is_a_share_of_the_mean_eigenvalue() -> None:
    expected = MOMENT + 0.5 * MOMENT.trace() / 5 * torch.eye(5, dtype=torch.float64)
    assert torch.allclose(ridged(MOMENT, 0.5), expected, atol=1e-14)


def test_ngram_entropy_has_the_golden_values() -> None:
    text = "the cat sat on the mat and the cat ran to the mat"
    assert math.isclose(ngram_entropy(text), 339.0164134887, rel_tol=1e-10)
    assert ngram_entropy("a a a a a a") == 0


def test_a_detector_of_one_key_without_damping_is_romes_direction() -> None:
    factor = Factor.of(MOMENT, 0.0)
    u = detector(factor, KEY[:, None], 0.0)
    left, right = rank_one(factor, KEY, VALUE)
    assert torch.allclose(VALUE[:, None] * u[None], left @ right, atol=1e-12)


def test_a_detector_answers_one_at_every_key_and_little_at_avoided_ones() -> None:
    factor = Factor.of(MOMENT, 0.0)
    own, others = KEYS[:, :2], KEYS[:, 2:]
    u = detector(factor, own, 0.0)
    assert torch.allclose(own.T @ u, torch.ones(2, dtype=torch.float64), atol=1e-10)
    avoiding = detector(factor, own, 0.0, others, 1e6)
    assert torch.allclose(own.T @ avoiding, torch.ones(2, dtype=torch.float64), atol=1e-8)
    assert float((others.T @ avoiding).abs().max()) < 1e-3 < float((others.T @ u).abs().max())


def test_avoided_keys_count_as_ordinary_text() -> None:
    """The Woodbury form equals the moment with the keys in it."""
    others, avoid = KEYS[:, 1:], 2.5
    direct = Factor.of(MOMENT + avoid / 3 * others @ others.T, 0.0)
    u = detector(Factor.of(MOMENT, 0.0), KEY[:, None], 0.3, others, avoid)
    assert torch.allclose(u, detector(direct, KEY[:, None], 0.3), atol=1e-10)
