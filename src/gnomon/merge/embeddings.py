"""Embeddings brought together: E-Mixup and E-Stitchup (arXiv 1912.00772), and averages of two sets of embeddings.

E-Stitchup is often listed among model merging. It merges no weights: it makes further training examples for a small
classifier over frozen embeddings, by stitching pairs of them together. What does merge embeddings of models is
`tokenizer_source: union` (tables aligned by token) and `gnomon merge transplant`.
Legend: B examples, D dimensions, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gnomon.errors import UsageError


@dataclass(frozen=True)
class Examples:
    """x_BD: embeddings. y_BK: how much of each class an example is; rows sum to 1."""

    x_BD: Tensor
    y_BK: Tensor

    @classmethod
    def of(cls, x_BD: Tensor, labels_B: Tensor, classes: int) -> Examples:
        """Examples of one class each."""
        if len(x_BD) != len(labels_B):
            raise UsageError(f"There are {len(x_BD)} embeddings and {len(labels_B)} labels.")
        return cls(x_BD, torch.nn.functional.one_hot(labels_B, classes).to(x_BD.dtype))


def mixup(batch: Examples, generator: torch.Generator, *, alpha: float = 1.0, epsilon: float = 0.0) -> Examples:
    """E-Mixup: l x1 + (1 - l) x2 of random pairs, l ~ Beta(alpha, alpha); targets likewise.

    epsilon: softens the targets to (1 - epsilon) y + epsilon / K.
    """
    partner, share_B1 = _pairs(batch, generator, alpha)
    x_BD = share_B1 * batch.x_BD + (1 - share_B1) * batch.x_BD[partner]
    return Examples(x_BD, _targets(batch, partner, share_B1, epsilon))


def stitchup(batch: Examples, generator: torch.Generator, *, alpha: float = 1.0, epsilon: float = 0.0) -> Examples:
    """E-Stitchup: each dimension from one of a pair, from the first with chance l; no value is interpolated."""
    partner, share_B1 = _pairs(batch, generator, alpha)
    first_BD = torch.rand(batch.x_BD.shape, generator=generator) < share_B1
    x_BD = torch.where(first_BD, batch.x_BD, batch.x_BD[partner])
    return Examples(x_BD, _targets(batch, partner, share_B1, epsilon))


def _pairs(batch: Examples, generator: torch.Generator, alpha: float) -> tuple[Tensor, Tensor]:
    if alpha <= 0:
        raise UsageError(f"alpha must be above 0, not {alpha}.", param="alpha")
    size = len(batch.x_BD)
    gamma_2B = torch._standard_gamma(torch.full((2, size), alpha), generator=generator)
    share_B = gamma_2B[0] / gamma_2B.sum(0).clamp(min=1e-30)  # Beta(alpha, alpha)
    return torch.randperm(size, generator=generator), share_B.to(batch.x_BD.dtype).unsqueeze(1)


def _targets(batch: Examples, partner: Tensor, share_B1: Tensor, epsilon: float) -> Tensor:
    y_BK = share_B1 * batch.y_BK + (1 - share_B1) * batch.y_BK[partner]
    return (1 - epsilon) * y_BK + epsilon / y_BK.shape[1]


def average(first_ND: Tensor, second_NE: Tensor) -> Tensor:
    """[N, max(D, E)]: the mean of two embeddings of the same things (arXiv 1804.05262), each of length 1 first.

    The shorter is filled up with zeros: independently trained spaces are nearly orthogonal, so little is lost.
    """
    if len(first_ND) != len(second_NE):
        raise UsageError(f"There are {len(first_ND)} and {len(second_NE)} embeddings; they must be of the same things.")
    wide = max(first_ND.shape[1], second_NE.shape[1])
    parts = [torch.nn.functional.normalize(part, dim=1) for part in (first_ND, second_NE)]
    padded = [torch.nn.functional.pad(part, (0, wide - part.shape[1])) for part in parts]
    return (padded[0] + padded[1]) / 2


def calibration_error(probabilities_BK: Tensor, labels_B: Tensor, bins: int = 15) -> float:
    """Expected calibration error: how far confidence and accuracy lie apart, over equal bins of confidence."""
    confidence_B, guess_B = probabilities_BK.max(1)
    right_B = (guess_B == labels_B).double()
    bin_B = (confidence_B * bins).ceil().long().clamp(1, bins) - 1
    gaps = [
        float((right_B[bin_B == b] - confidence_B[bin_B == b].double()).mean().abs() * (bin_B == b).double().mean())
        for b in range(bins)
        if bool((bin_B == b).any())
    ]
    return sum(gaps)
