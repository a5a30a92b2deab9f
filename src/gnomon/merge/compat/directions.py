"""The spherical methods, and those of one other model, as mergekit 0.1.5 computes them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import vector_norm

from gnomon.errors import MergeError

QUANTILE_SAMPLE = 1_000_000


def model_stock(models: list[Tensor], base: Tensor, _: torch.Generator, *, filter_wise: bool) -> Tensor:
    def rows(tensor: Tensor) -> Tensor:
        return tensor.reshape(1, -1) if not filter_wise or tensor.dim() < 2 else tensor

    deltas = [rows(model) - rows(base) for model in models]
    cosines = [
        ((a * b).sum(-1) / (vector_norm(a, dim=-1) * vector_norm(b, dim=-1)).clamp(min=1e-6)).clamp(-1, 1)
        for place, a in enumerate(deltas)
        for b in deltas[place + 1 :]
    ]
    cosine = torch.stack(cosines).mean(0).unsqueeze(-1)
    count = len(models)
    denominator = 1 + (count - 1) * cosine
    singular = denominator.abs() < 1e-6
    t = torch.where(singular, 0, count * cosine / torch.where(singular, 1, denominator))
    total = rows(models[0])
    for model in models[1:]:
        total = total + rows(model)
    return (t * (total / count) + (1 - t) * rows(base)).reshape(base.shape)


def nuslerp(
    models: list[Tensor],
    base: Tensor | None,
    _: torch.Generator,
    *,
    weight: list[float],
    nuslerp_flatten: bool,
    nuslerp_row_wise: bool,
) -> Tensor:
    total = sum(weight)
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    ends = [model if base is None else model - base for model in models]
    shape = ends[0].shape
    if nuslerp_flatten:
        ends = [end.reshape(-1) for end in ends]
    elif nuslerp_row_wise:
        ends = [end.transpose(0, -1) for end in ends]
    units = [end / vector_norm(end, dim=-1, keepdim=True).clamp(min=1e-7) for end in ends]
    cosine = (units[0] * units[1]).sum(-1, keepdim=True).clamp(-1, 1)
    parallel = 1 - cosine.square() <= 1e-16
    angle = torch.acos(torch.where(parallel, 0, cosine))
    turned = (torch.sin((1 - t) * angle) * ends[0] + torch.sin(t * angle) * ends[1]) / torch.sin(angle)
    merged = torch.where(parallel, (1 - t) * ends[0] + t * ends[1], turned)
    if nuslerp_row_wise and not nuslerp_flatten:
        merged = merged.transpose(0, -1)
    return merged.reshape(shape) if base is None else base + merged.reshape(shape)


def multislerp(
    models: list[Tensor],
    base: Tensor | None,
    _: torch.Generator,
    *,
    weight: list[float],
    normalize_weights: bool,
    eps: float,
) -> Tensor:
    if len(models) == 1:
        return models[0]
    shape = models[0].shape
    x_nE = torch.stack(models if base is None else [model - base for model in models]).reshape(len(models), -1)
    share_n1 = torch.tensor(weight, dtype=x_nE.dtype).unsqueeze(-1)
    if normalize_weights:
        share_n1 = share_n1 / share_n1.sum()
    norm_n1 = vector_norm(x_nE, dim=-1, keepdim=True)
    unit_nE = x_nE / (norm_n1 + eps)
    mean_E = (unit_nE * share_n1).sum(0)
    length = vector_norm(mean_E)
    if length < eps:
        if len(models) > 2:
            raise MergeError("The weighted directions cancel, so multislerp has no answer.", hint="Change a weight.")
        merged_E = x_nE[0] * share_n1[0] + x_nE[1] * share_n1[1]
    else:
        mean_E = mean_E / length
        tangent_E = ((unit_nE - (unit_nE * mean_E).sum(-1, keepdim=True) * mean_E) * share_n1).sum(0)
        angle = vector_norm(tangent_E) + eps
        merged_E = mean_E * torch.cos(angle) + tangent_E * (torch.sin(angle) / angle)
        merged_E = merged_E * (norm_n1 * share_n1).sum()
    return merged_E.reshape(shape) if base is None else merged_E.reshape(shape) + base


def karcher(models: list[Tensor], base: None, _: torch.Generator, *, max_iter: int, tol: float) -> Tensor:
    if len(models) == 1:
        return models[0]
    stored = models[0].dtype
    wide = torch.float64 if stored is torch.float64 else torch.float32
    norms = [vector_norm(model.to(wide)) for model in models]
    alive = [place for place, norm in enumerate(norms) if norm > tol]
    if not alive:
        return torch.zeros_like(models[0])
    units = [(models[place] / norms[place]).to(stored) for place in alive]
    each = 1.0 / len(models)
    share = each / sum([each] * len(alive))
    mean = torch.zeros_like(units[0])
    for unit in units:
        mean += share * unit
    length = vector_norm(mean.to(wide))
    mean = units[0].clone() if length < tol else (mean / length).to(stored)
    for _step in range(max_iter):
        tangent = torch.zeros_like(mean)
        for unit in units:
            dot = torch.dot(mean.reshape(-1), unit.reshape(-1)).clamp(-1, 1)
            angle = torch.arccos(dot)
            if angle >= tol:
                tangent += share * (angle / torch.sin(angle)) * (unit - dot * mean)
        length = vector_norm(tangent.to(wide))
        if length < tol:
            break
        mean = (torch.cos(length) * mean + torch.sin(length) * (tangent / length)).to(stored)
        norm = vector_norm(mean.to(wide))
        if norm > tol:
            mean = (mean / norm).to(stored)
    scale = each * norms[0]
    for further in norms[1:]:
        scale = scale + each * further
    merged: Tensor = scale * mean
    return merged


def nearswap(models: list[Tensor], base: Tensor, _: torch.Generator, *, t: float) -> Tensor:
    share = (t / (base - models[0]).abs().clamp(min=1e-6)).clamp(0, 1)
    return share * models[0] + (1 - share) * base


def passthrough(models: list[Tensor], base: None, _: torch.Generator, *, scale: list[float | None]) -> Tensor:
    return models[0] if scale[0] is None else models[0] * scale[0]


def arcee_fusion(models: list[Tensor], base: Tensor, generator: torch.Generator) -> Tensor:
    share, share_of_base = models[0].softmax(-1) + 1e-8, base.softmax(-1) + 1e-8
    divergence = (share * (share / share_of_base).log()).sum(-1, keepdim=True)
    delta = models[0] - base
    importance = delta.abs() * divergence
    flat = importance.reshape(-1)
    if flat.numel() > QUANTILE_SAMPLE:
        flat = flat[torch.randint(flat.numel(), (QUANTILE_SAMPLE,), generator=generator)]
    first, median, third = flat.sort().values[(torch.tensor([0.25, 0.5, 0.75]) * (flat.numel() - 1)).long()]
    merged: Tensor = base + delta * (importance >= median + 1.5 * (third - first)).float()
    return merged
