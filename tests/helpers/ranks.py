"""One MLP shared by ranks, and the process that runs one of them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gnomon.kernels import make_operators
from gnomon.kernels.operators import Operators
from gnomon.kernels.tensor_parallel import ColumnParallelLinear, Ranks, RowParallelLinear

HIDDEN, INNER, ROWS = 32, 80, 5


def weights() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN,), (ROWS, HIDDEN))
    up, down, bias, x = (torch.randn(shape, generator=generator) for shape in shapes)
    return up, down, bias, x


def feed_forward(ranks: Ranks, operators: Operators) -> Tensor:
    """One MLP, its inner channels shared by the ranks."""
    up, down, bias, x = weights()
    inner = ColumnParallelLinear(up, None, operators, ranks)(x)
    return RowParallelLinear(down, bias, operators, ranks)(inner.clamp(min=0))


def work(rank: int, count: int, folder: str, dtype: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=count)
    try:
        operators = make_operators(dtype, threads=1)
        torch.save(feed_forward(Ranks.of_process_group(), operators), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
