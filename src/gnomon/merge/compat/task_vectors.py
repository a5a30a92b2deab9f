"""Task arithmetic and its kin as mergekit 0.1.5 computes them: in the models' type, whole tensors at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Whole = Callable[..., Tensor]
"""whole(models, base, generator, **the method's parameters) -> the merged tensor."""
SMALLEST_NORM = 1e-7


def _combined(
    base: Tensor, deltas: Sequence[Tensor], weight: Sequence[float], *, elect: bool, normalize: bool, scale: float
) -> Tensor:
    """base + scale * weighted sum; elect: of what has the sign of the sum (0 counts as +)."""
    if not deltas:
        return base
    shares_n = torch.tensor(list(weight), dtype=base.dtype).reshape(-1, *[1] * base.dim())
    weighted_n = torch.stack(list(deltas)) * shares_n
    if elect:
        positive = weighted_n.sum(0) >= 0
        agrees_n = torch.where(positive, weighted_n > 0, weighted_n < 0)
        merged, divisor = (weighted_n * agrees_n).sum(0), (shares_n * agrees_n).sum(0)
        divisor = torch.where(divisor == 0, 1, divisor)
    else:
        merged, divisor = weighted_n.sum(0), shares_n.sum(0)
        divisor = torch.where(divisor.abs() < 1e-8, 1, divisor)
    if normalize:
        merged = merged / divisor
    return base + (merged if scale == 1 else merged * scale)


def _kept(delta: Tensor, mask: Tensor, rescale: str) -> Tensor:
    """The kept elements, brought back to the L1 norm of all (or divided by nothing, or by the density: `rescale`)."""
    kept = delta * mask
    if rescale != "l1":
        return kept
    before, after = delta.abs().sum(), kept.abs().sum()
    return kept if before < SMALLEST_NORM or after < SMALLEST_NORM else kept * (before / after)


def _mask(order: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """1 at the flat places listed, 0 elsewhere."""
    mask = torch.zeros(math.prod(shape), dtype=dtype)
    mask[order] = 1
    return mask.reshape(shape)


def _magnitudes(delta: Tensor) -> Tensor:
    return delta.abs().reshape(-1).float()


def _greatest(delta: Tensor, density: float, rescale: bool) -> Tensor:
    if density >= 1 or delta.numel() == 0:
        return delta
    if density <= 0:
        return torch.zeros_like(delta)
    count = max(1, int(density * delta.numel()))
    mask = _mask(_magnitudes(delta).argsort(descending=True)[:count], delta.shape, delta.dtype)
    return _kept(delta, mask, "l1" if rescale else "false")


def _band(delta: Tensor, density: float, gamma: float, rescale: bool) -> Tensor:
    """Without the greatest, then without the smallest."""
    if density >= 1:
        return delta
    size = delta.numel()
    count = int(density * size)
    first = max(0, size - count - int(gamma * size))
    mask = _mask(_magnitudes(delta).argsort()[first : first + count], delta.shape, delta.dtype)
    return _kept(delta, mask, "l1" if rescale else "false")


def _drawing_dtype(delta: Tensor) -> torch.dtype:
    """Half floats draw in float32, the rest in their own type."""
    return delta.dtype if delta.dtype is torch.bfloat16 else torch.float32


def _dropped(delta: Tensor, density: float, rescale: str, generator: torch.Generator) -> Tensor:
    if density >= 1:
        return delta
    work = _drawing_dtype(delta)
    mask = torch.bernoulli(torch.full_like(delta, density, dtype=work), generator=generator)
    kept = _kept(delta.to(work), mask, rescale)
    if rescale == "inverse_density" and density > 0:
        kept = kept / density
    return kept.to(delta.dtype)


def _dropped_by_rank(
    delta: Tensor, density: float, epsilon: float, rescale: bool, generator: torch.Generator
) -> Tensor:
    """The chance to stay grows with the rank within a row (of a tensor of more dimensions: along the second)."""
    if density >= 1:
        return delta
    work = _drawing_dtype(delta)
    rows = delta if delta.dim() > 1 else delta.unsqueeze(0)
    rank = rows.abs().argsort(dim=1).argsort(dim=1).to(work) + 1
    low, high = rank.amin(1, keepdim=True), rank.amax(1, keepdim=True)
    place = torch.where(high > low, ((rank - low) / (high - low)).clamp(0, 1), 0)
    mask = torch.bernoulli((density - epsilon) + place * 2 * epsilon, generator=generator)
    return _kept(rows.to(work), mask, "l1" if rescale else "false").to(delta.dtype).reshape(delta.shape)


def task_arithmetic(
    models: list[Tensor], base: Tensor, _: torch.Generator, *, weight: list[float], normalize: bool, lambda_: float
) -> Tensor:
    deltas = [model - base for model in models]
    return _combined(base, deltas, weight, elect=False, normalize=normalize, scale=lambda_)


def ties(
    models: list[Tensor],
    base: Tensor,
    _: torch.Generator,
    *,
    weight: list[float],
    density: list[float],
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Tensor:
    deltas = [_greatest(model - base, share, rescale) for model, share in zip(models, density, strict=True)]
    return _combined(base, deltas, weight, elect=True, normalize=normalize, scale=lambda_)


def breadcrumbs(elect: bool) -> Whole:
    def whole(
        models: list[Tensor],
        base: Tensor,
        _: torch.Generator,
        *,
        weight: list[float],
        density: list[float],
        gamma: list[float],
        normalize: bool,
        rescale: bool,
        lambda_: float,
    ) -> Tensor:
        deltas = [_band(model - base, d, g, rescale) for model, d, g in zip(models, density, gamma, strict=True)]
        return _combined(base, deltas, weight, elect=elect, normalize=normalize, scale=lambda_)

    return whole


def dare(elect: bool) -> Whole:
    def whole(
        models: list[Tensor],
        base: Tensor,
        generator: torch.Generator,
        *,
        weight: list[float],
        density: list[float],
        rescale: str,
        normalize: bool,
        lambda_: float,
    ) -> Tensor:
        kind = "l1" if rescale == "true" else rescale
        deltas = [_dropped(model - base, d, kind, generator) for model, d in zip(models, density, strict=True)]
        return _combined(base, deltas, weight, elect=elect, normalize=normalize, scale=lambda_)

    return whole


def della(elect: bool) -> Whole:
    def whole(
        models: list[Tensor],
        base: Tensor,
        generator: torch.Generator,
        *,
        weight: list[float],
        density: list[float],
        epsilon: list[float],
        rescale: bool,
        normalize: bool,
        lambda_: float,
    ) -> Tensor:
        triples = zip(models, density, epsilon, strict=True)
        deltas = [_dropped_by_rank(model - base, d, e, rescale, generator) for model, d, e in triples]
        return _combined(base, deltas, weight, elect=elect, normalize=normalize, scale=lambda_)

    return whole


def sce(models: list[Tensor], base: Tensor, _: torch.Generator, *, select_topk: float) -> Tensor:
    deltas_n = torch.stack([model - base for model in models])
    if select_topk < 1:
        variance = deltas_n.var(0, unbiased=False)
        count = int(torch.count_nonzero(variance) * select_topk) if select_topk > 0 else 0
        places = variance.abs().reshape(-1).topk(count).indices
        deltas_n = deltas_n * _mask(places, base.shape, base.dtype)
    energy_n = deltas_n.square().reshape(len(models), -1).mean(1)
    total = energy_n.sum().item()
    shares_n = torch.ones_like(energy_n) / len(models) if abs(total) < 1e-6 else energy_n / total
    # an element of 0 agrees with no sign
    agrees_n = torch.where(deltas_n.sum(0) >= 0, deltas_n > 0, deltas_n < 0)
    erased_n = shares_n.reshape(-1, *[1] * base.dim()) * agrees_n
    return base + (deltas_n * erased_n).sum(0) / erased_n.sum(0).clamp(min=1e-6)


def ram(plus: bool) -> Whole:
    def whole(
        models: list[Tensor],
        base: Tensor,
        _: torch.Generator,
        *,
        epsilon: float,
        r: float = 0.0,
        alpha: float = 0.0,
    ) -> Tensor:
        deltas_nE = torch.stack([model - base for model in models]).reshape(len(models), -1)
        changed_nE = deltas_nE.abs() > epsilon
        count_E = changed_nE.sum(0)
        alone_E, several_E = count_E == 1, count_E > 1
        part_nE = deltas_nE * changed_nE
        own_nE = part_nE * alone_E
        if plus:
            shared_n, unique_n = (changed_nE & several_E).sum(1), (changed_nE & alone_E).sum(1)
            ratio_n = (shared_n / unique_n.clamp(min=epsilon)).clamp(0, alpha)
            own_nE = own_nE * (1 + r * ratio_n).unsqueeze(-1)
        merged_E = (own_nE + part_nE * several_E / count_E.clamp(min=1)).sum(0)
        return (base + merged_E.reshape(base.shape)).to(torch.promote_types(base.dtype, merged_E.dtype))

    return whole
