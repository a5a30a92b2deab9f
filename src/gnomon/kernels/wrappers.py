"""Wrappers: what a patch does to activations where no weight could do it, for some rows of a batch.

Four kinds, each a function of one row alone, made of canonical products, so that a row's bits depend on that row and
its patches. Three change the output of a layer's MLP (before its norm, in networks that have one there), `affine` the
layer's output. Knows nothing of patch files, names or methods.
Legend: T rows, C hidden channels, M inner channels of the MLP, n entries, r rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from gnomon.kernels.operators import LinearWeight

if TYPE_CHECKING:
    from gnomon.kernels.side import SideRows

SHAPES: dict[str, dict[str, str]] = {
    "neurons": {"key": "nC", "bias": "n", "value": "nC"},
    "codebook": {"key": "nC", "radius": "n", "value": "nC"},
    "routed": {"up": "Cr", "down": "rM", "threshold": "1"},
    "affine": {"left": "Cr", "right": "rC", "bias": "C"},
}
"""Every kind's tensors, float32, and their axes. neurons may also hold `gate` (nC)."""
OPTIONAL = {"neurons": {"gate": "nC"}}


class Products(Protocol):
    """The operators that wrappers need."""

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor: ...
    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor: ...
    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Site:
    """One layer's activations of some rows. normed: what enters the MLP; inner: what enters its down projection."""

    normed_TC: Tensor
    inner_TM: Tensor


class MlpWrapper(Protocol):
    """Changes the output of an MLP."""

    def around(self, site: Site, out_TC: Tensor, ops: Products) -> Tensor: ...


@dataclass(frozen=True)
class Neurons:
    """Slots added to the MLP: out + act(x key^T + bias) value (CaliNET, arXiv 2210.03329; T-Patcher, 2301.09785).

    act: ReLU; with `gate` the network's own, act(x gate^T) * (x key^T + bias).
    """

    key: LinearWeight
    bias_n: Tensor
    value: LinearWeight
    gate: LinearWeight | None
    gelu: bool

    def around(self, site: Site, out_TC: Tensor, ops: Products) -> Tensor:
        active_Tn = ops.linear(site.normed_TC, self.key, self.bias_n)
        if self.gate is None:
            active_Tn = torch.relu(active_Tn)
        else:
            both = torch.cat([ops.linear(site.normed_TC, self.gate), active_Tn], dim=1)
            active_Tn = ops.gelu_mul(both) if self.gelu else ops.silu_mul(both)
        return out_TC + ops.linear(active_Tn, self.value)


@dataclass(frozen=True)
class Codebook:
    """The value of the nearest key, where the row lies within that key's radius (GRACE, arXiv 2211.11031).

    |x - k|^2 = x.x - 2 x.k + k.k with canonical products.
    """

    ones: LinearWeight
    minus_twice_key: LinearWeight
    square_n: Tensor
    reach_n: Tensor
    value_nC: Tensor

    def around(self, site: Site, out_TC: Tensor, ops: Products) -> Tensor:
        x = site.normed_TC
        distance_Tn = ops.linear(x, self.minus_twice_key, self.square_n) + ops.linear(x * x, self.ones)
        least_T, nearest_T = distance_Tn.min(dim=1)
        within_T = least_T <= self.reach_n[nearest_T]
        return torch.where(within_T[:, None], self.value_nC[nearest_T], out_TC)


@dataclass(frozen=True)
class Routed:
    """A side memory W + up down, taken where it answers by at least the threshold otherwise than W does
    (WISE, arXiv 2405.14768).
    """

    up: LinearWeight
    down: LinearWeight
    ones: LinearWeight
    threshold: float

    def around(self, site: Site, out_TC: Tensor, ops: Products) -> Tensor:
        added_TC = ops.linear(ops.linear(site.inner_TM, self.down), self.up)
        square_T1 = ops.linear(added_TC * added_TC, self.ones)
        return torch.where(square_T1 >= self.threshold**2, out_TC + added_TC, out_TC)


@dataclass(frozen=True)
class Affine:
    """h + left (right h) + bias on the layer's output h: steering (right empty) and LEACE (arXiv 2306.03819)."""

    left: LinearWeight | None
    right: LinearWeight | None
    bias_C: Tensor

    def added(self, stream_TC: Tensor, ops: Products) -> Tensor:
        if self.left is None or self.right is None:
            return self.bias_C.expand_as(stream_TC)
        return ops.linear(ops.linear(stream_TC, self.right), self.left, self.bias_C)


Wrapping = Neurons | Codebook | Routed | Affine


def make_wrapper(kind: str, tensors: Mapping[str, Tensor], *, gelu: bool = False) -> Wrapping:
    """A kind's tensors, shapes already checked, ready to run. gelu: the network's own activation."""
    t = {name: tensor.to(torch.float32).contiguous() for name, tensor in tensors.items()}
    if kind == "neurons":
        gate = _weight(t["gate"]) if "gate" in t else None
        return Neurons(_weight(t["key"]), t["bias"], _weight(t["value"].T), gate, gelu)
    if kind == "codebook":
        key = t["key"]
        return Codebook(
            _ones(key.shape[1]), _weight(-2.0 * key), (key * key).sum(1), t["radius"] * t["radius"], t["value"]
        )
    if kind == "routed":
        return Routed(_weight(t["up"]), _weight(t["down"]), _ones(t["up"].shape[0]), float(t["threshold"][0]))
    if t["right"].shape[0] == 0:
        return Affine(None, None, t["bias"])
    return Affine(_weight(t["left"]), _weight(t["right"]), t["bias"])


def wrapped_layers(groups: Sequence[SideRows]) -> list[int]:
    """Layers at which some row's patches hold a wrapper, ascending."""
    return sorted({layer for group in groups for path in group.paths for layer in path.wrappers})


def wrap_mlp(groups: Sequence[SideRows], layer: int, site: Site, out_TC: Tensor, ops: Products) -> None:
    """Change the MLP's output of those rows that wear a wrapper at this layer, in place."""
    for group in groups:
        rows = slice(group.begin, group.end)
        for path in group.paths:
            for wrapper in path.wrappers.get(layer, ()):
                if not isinstance(wrapper, Affine):
                    here = Site(site.normed_TC[rows], site.inner_TM[rows])
                    out_TC[rows] = wrapper.around(here, out_TC[rows], ops)


def wrap_stream(groups: Sequence[SideRows], layer: int, residual_TC: Tensor, fed_TC: Tensor, ops: Products) -> None:
    """Change the layer's output, residual + fed, of those rows that wear an `affine` here: in fed, in place."""
    for group in groups:
        rows = slice(group.begin, group.end)
        for path in group.paths:
            for wrapper in path.wrappers.get(layer, ()):
                if isinstance(wrapper, Affine):
                    fed_TC[rows] += wrapper.added(residual_TC[rows] + fed_TC[rows], ops)


def _weight(tensor: Tensor) -> LinearWeight:
    data = tensor.contiguous()
    return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=data)


def _ones(size: int) -> LinearWeight:
    return _weight(torch.ones(1, size))
