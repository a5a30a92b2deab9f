"""Several patches of one model as one: a weighted sum, or TIES (trim, elect signs, merge; arXiv 2306.01708).

Knows nothing of where the patches came from.
Legend: n patches, ... a tensor's own shape.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.errors import PatchError
from gnomon.models.patch.deltas import Delta, Dense
from gnomon.models.patch.patch import Patch

METHODS = ("sum", "mean", "ties")


def ties(deltas: Sequence[Tensor], *, weights: Sequence[float], density: float, normalize: bool = True) -> Tensor:
    """One delta [...] from n: each trimmed to its largest `density` share of entries, one sign elected per entry by
    the weighted sum, and those that agree averaged (normalize) or summed by weight.
    """
    trimmed = torch.stack(
        [weight * trim(delta.float(), density) for delta, weight in zip(deltas, weights, strict=True)]
    )
    elected = trimmed.sum(dim=0).sign()
    agrees = (trimmed.sign() == elected) & (trimmed != 0)
    total = torch.where(agrees, trimmed, 0.0).sum(dim=0)
    if not normalize:
        return total
    shape = (-1,) + (1,) * (trimmed.dim() - 1)
    shares = torch.where(agrees, torch.tensor(weights).reshape(shape), 0.0).sum(dim=0)
    return torch.where(shares != 0, total / torch.where(shares != 0, shares, 1.0), 0.0)


def trim(delta: Tensor, density: float) -> Tensor:
    """The largest `density` share of entries by magnitude, the rest zero; of equal ones the earlier."""
    kept = round(density * delta.numel())
    if kept >= delta.numel():
        return delta
    flat = delta.reshape(-1)
    order = torch.sort(flat.abs(), descending=True, stable=True).indices[:kept]
    out = torch.zeros_like(flat)
    out[order] = flat[order]
    return out.reshape(delta.shape)


def merge_patches(
    patches: Sequence[Patch],
    *,
    method: str = "sum",
    weights: Sequence[float] | None = None,
    density: float = 0.2,
) -> Patch:
    """One patch from several of the same base.

    sum: weighted sum; low-rank patches stay low-rank. mean: the same, divided by the sum of the weights. ties: dense.
    weights: one per patch (default 1). density: of ties, the share each patch keeps per tensor.
    Raises PatchError for different bases, a method, weight or density that makes no sense.
    """
    if method not in METHODS:
        raise PatchError(f"Unknown way of merging `{method}`.", hint=f"Known: {', '.join(METHODS)}.")
    factors = [1.0] * len(patches) if weights is None else [float(weight) for weight in weights]
    if len(patches) < 2 or len(factors) != len(patches):
        raise PatchError(f"{len(patches)} patches and {len(factors)} weights: give at least two, and one weight each.")
    if not 0 < density <= 1:
        raise PatchError(f"A density lies in (0, 1], not {density}.")
    total = sum(factors)
    if method != "sum" and total == 0:
        raise PatchError("The weights add up to 0: nothing can be averaged.")
    metadata = {
        "method": f"merge:{method}",
        "weights": factors,
        **({"density": density} if method == "ties" else {}),
        "of": [patch.identity for patch in patches],
    }
    if method == "ties" and (wrapped := [name for patch in patches for name in patch.wrappers]):
        raise PatchError(f"TIES merges what is added to weights, not what acts on activations ({wrapped[0]}).")
    if method == "ties":
        return Patch(_ties(patches, factors, density), _one_base(patches), metadata)
    scale = total if method == "mean" else 1.0
    joined = patches[0] * (factors[0] / scale)
    for patch, factor in zip(patches[1:], factors[1:], strict=True):
        joined = joined + patch * (factor / scale)
    return Patch(joined.deltas, joined.base, metadata, wrappers=joined.wrappers)


def _one_base(patches: Sequence[Patch]) -> str:
    bases = sorted({patch.base for patch in patches})
    if len(bases) > 1:
        raise PatchError(f"These patches belong to different bases: {', '.join(base[:12] for base in bases)}.")
    return bases[0]


def _ties(patches: Sequence[Patch], factors: Sequence[float], density: float) -> dict[str, Delta]:
    """A patch that leaves a tensor alone has no say in it."""
    merged: dict[str, Delta] = {}
    for name in sorted({name for patch in patches for name in patch.deltas}):
        chosen = [(p.dense(name), factor) for p, factor in zip(patches, factors, strict=True) if name in p.deltas]
        if len({tuple(delta.shape) for delta, _ in chosen}) > 1:
            raise PatchError(f"`{name}` has different shapes in these patches.")
        merged[name] = Dense(ties([d for d, _ in chosen], weights=[f for _, f in chosen], density=density))
    return merged
