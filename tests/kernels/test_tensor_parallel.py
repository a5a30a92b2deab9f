"""A sum shared by ranks has the same bits with one, two and four of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

from gnomon.errors import UsageError
from gnomon.kernels import make_operators
from gnomon.kernels.tensor_parallel import LEAVES, ColumnParallelLinear, Ranks, RowParallelLinear, tree_sum
from helpers.ranks import feed_forward, weights, work


@pytest.mark.parametrize(("count", "dtype"), [(2, "bf16"), (4, "fp32")])
def test_the_number_of_ranks_changes_no_bit(count: int, dtype: str, tmp_path: Path) -> None:
    alone = feed_forward(Ranks(), make_operators(dtype, threads=1))
    mp.spawn(work, args=(count, str(tmp_path), dtype), nprocs=count)  # type: ignore[no-untyped-call]
    for rank in range(count):
        assert torch.equal(torch.load(tmp_path / f"{rank}.pt"), alone)


def test_a_sum_by_rank_order_would_change_bits() -> None:
    """The mutation check: adding the ranks' sums one after another is another sum."""
    parts = list(torch.randn(LEAVES, 400, generator=torch.Generator().manual_seed(1)))
    in_turn = parts[0]
    for part in parts[1:]:
        in_turn = in_turn + part
    assert not torch.equal(tree_sum(parts), in_turn)
    for count in (1, 2, 4, 8):
        each = LEAVES // count
        roots = [tree_sum(parts[i * each : (i + 1) * each]) for i in range(count)]
        assert torch.equal(tree_sum(roots), tree_sum(parts))


def test_it_is_the_product_up_to_rounding() -> None:
    up, down, bias, x = weights()
    expected = (x @ up.t()).clamp(min=0) @ down.t() + bias
    assert torch.allclose(feed_forward(Ranks(), make_operators("fp32", threads=1)), expected, atol=1e-4)


def test_what_cannot_be_shared_is_refused() -> None:
    operators = make_operators("fp32", threads=1)
    with pytest.raises(UsageError, match="3 ranks"):
        Ranks(0, 3)
    with pytest.raises(UsageError, match="30 inputs"):
        RowParallelLinear(torch.zeros(4, 30), None, operators, Ranks())
    with pytest.raises(UsageError, match="outputs cannot be shared"):
        ColumnParallelLinear(torch.zeros(5, 8), None, operators, Ranks(0, 2))
