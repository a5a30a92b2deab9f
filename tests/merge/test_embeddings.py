"""Embeddings brought together: what E-Mixup, E-Stitchup and averages are, number by number."""

from __future__ import annotations

import pytest
import torch

from gnomon.errors import UsageError
from gnomon.merge.embeddings import Examples, average, calibration_error, mixup, stitchup


def batch(size: int = 400) -> Examples:
    generator = torch.Generator().manual_seed(1)
    x, labels = torch.randn(size, 6, generator=generator), torch.arange(size) % 3
    return Examples.of(x, labels, 3)


def test_stitched_coordinates_are_those_of_one_of_the_pair_and_targets_say_how_many() -> None:
    examples = batch()
    made = stitchup(examples, torch.Generator().manual_seed(2))
    partner = torch.randperm(400, generator=_after_gamma(2, 400))
    first, second = examples.x_BD, examples.x_BD[partner]
    assert bool(((made.x_BD == first) | (made.x_BD == second)).all())
    share = ((made.x_BD == first) & (first != second)).double().mean(1)
    own = (made.y_BK * examples.y_BK).sum(1).double()
    different = (examples.y_BK * examples.y_BK[partner]).sum(1) == 0
    assert float(torch.corrcoef(torch.stack([share, own])[:, different])[0, 1]) > 0.8
    assert torch.allclose(made.y_BK.sum(1), torch.ones(400))


def _after_gamma(seed: int, size: int) -> torch.Generator:
    generator = torch.Generator().manual_seed(seed)
    torch._standard_gamma(torch.ones(2, size), generator=generator)
    return generator


def test_mixed_examples_lie_between_their_pair_as_their_targets_say() -> None:
    examples = batch()
    made = mixup(examples, torch.Generator().manual_seed(2), alpha=1.0)
    partner = torch.randperm(400, generator=_after_gamma(2, 400))
    first, second = examples.x_BD, examples.x_BD[partner]
    moved = partner != torch.arange(400)
    share = ((made.x_BD - second) * (first - second)).sum(1)[moved] / (first - second).square().sum(1)[moved]
    wanted = share.unsqueeze(1) * examples.y_BK[moved] + (1 - share.unsqueeze(1)) * examples.y_BK[partner][moved]
    assert torch.allclose(made.y_BK[moved], wanted, atol=1e-4)
    assert 0.42 < float(share.mean()) < 0.58 and float(share.var()) == pytest.approx(1 / 12, abs=0.02)


def test_soft_targets_keep_a_share_for_every_class() -> None:
    made = stitchup(batch(), torch.Generator().manual_seed(2), epsilon=0.3)
    assert float(made.y_BK.min()) >= 0.1 - 1e-6 and torch.allclose(made.y_BK.sum(1), torch.ones(400))


def test_the_average_of_two_spaces_fills_up_the_shorter() -> None:
    made = average(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.0, 2.0]]))
    assert torch.allclose(made, torch.tensor([[0.3, 0.4, 0.5]]))
    with pytest.raises(UsageError, match="same things"):
        average(torch.ones(2, 3), torch.ones(3, 3))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    sure = torch.tensor([[0.9, 0.1]] * 10)
    assert calibration_error(sure, torch.tensor([0] * 9 + [1])) == pytest.approx(0.0, abs=1e-6)
    assert calibration_error(sure, torch.tensor([1] * 10)) == pytest.approx(0.9, abs=1e-6)
