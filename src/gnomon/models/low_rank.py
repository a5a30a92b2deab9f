"""The product of two low-rank factors, with the same bits on every machine."""

from __future__ import annotations

import torch
from torch import Tensor


def product(up: Tensor, down: Tensor) -> Tensor:
    """up @ down -> [o, i] float32, summed in float64 and rounded once, whatever matrix library is underneath.

    An identity promises bits, and libraries differ in the last bit of a sum. Where that bit could decide how an entry
    is rounded (some in ten million), the entry is summed again in the order of the ranks.
    """
    up, down = up.double(), down.double()
    sums = up @ down
    slack = (up.abs() @ down.abs()) * (up.shape[1] * 2.0**-50)  # eight times the largest error of any order
    result = sums.float()
    rows, columns = ((sums - slack).float() != (sums + slack).float()).nonzero(as_tuple=True)
    if len(rows):
        total = torch.zeros(len(rows), dtype=torch.float64)
        for place in range(up.shape[1]):
            total += up[rows, place] * down[place, columns]
        result[rows, columns] = total.float()
    return result
