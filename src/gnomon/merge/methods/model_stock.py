"""Model Stock (arXiv 2403.19522): between the base and the models' mean, as far as the angle between them says."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.registry import merge_method
from gnomon.merge.sphere import gram

TINY = 1e-6


def interpolation(cosine: Tensor, models: int) -> Tensor:
    """t = N cos / (1 + (N - 1) cos); 0 (the base) where that is singular."""
    denominator = 1 + (models - 1) * cosine
    singular = denominator.abs() < TINY
    return torch.where(singular, torch.zeros_like(cosine), models * cosine / torch.where(singular, 1, denominator))


def mean_cosine(products: Tensor) -> Tensor:
    """Mean over pairs; products: [..., n, n] inner products."""
    models = products.shape[-1]
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    cosines = products / (norms.unsqueeze(-1) * norms.unsqueeze(-2)).clamp_min(TINY)
    upper = torch.triu_indices(models, models, offset=1)
    return cosines[..., upper[0], upper[1]].clamp(-1, 1).mean(-1)


def measure(view: TensorView, *, filter_wise: bool) -> float | None:
    """t for the whole tensor; None where each row finds its own."""
    if filter_wise and len(view.shape) > 1:
        return None
    products = gram(view, "deltas")
    return float(interpolation(mean_cosine(products), len(view.readers)))


@merge_method("model_stock", sources=(2, None), measure=measure, scratch=7, reference="arXiv 2403.19522")
def model_stock(block: Block, measured: float | None, *, filter_wise: bool = False) -> Tensor:
    """Interpolate between base and mean by the angle between task vectors."""
    if measured is not None:
        average_RC = block.models_RC[0].clone()
        for model_RC in block.models_RC[1:]:
            average_RC += model_RC
        t = torch.tensor(measured, dtype=average_RC.dtype)
        return (average_RC / len(block.models_RC)) * t + block.base * (1 - t)
    models_nRC = torch.stack(block.models_RC)
    deltas_nRC = torch.stack(block.deltas()).double()
    products = torch.einsum("irc,jrc->rij", deltas_nRC, deltas_nRC)
    t_R1 = interpolation(mean_cosine(products), len(models_nRC)).to(models_nRC.dtype).unsqueeze(-1)
    return models_nRC.mean(0) * t_R1 + block.base * (1 - t_R1)
