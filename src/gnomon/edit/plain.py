"""The products that wrappers need, on plain torch with gradients: how they are trained in the transformers module."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.kernels.operators import LinearWeight


class PlainProducts:
    """Implements `kernels.wrappers.Products`."""

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        y_TN: Tensor = x_TK.float() @ weight.data.T
        return y_TN if bias_N is None else y_TN + bias_N

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate) * up

    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        return torch.nn.functional.gelu(gate, approximate="tanh") * up


PLAIN = PlainProducts()
