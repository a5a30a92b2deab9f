"""The torch operators give one row the same bits whatever stands beside it. Exact comparisons only."""

from __future__ import annotations

import pytest
import torch

from gnomon.errors import UsageError
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.torch_operators import TorchOperators

ROWS = [1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 33, 64, 65]


@pytest.fixture(params=[1, 2], ids=["1 thread", "2 threads"])
def ops(request: pytest.FixtureRequest) -> TorchOperators:
    return TorchOperators("fp32", request.param)


@pytest.mark.parametrize(("n", "k"), [(576, 576), (192, 576), (576, 1536), (3000, 576), (80, 48)])
def test_a_linear_row_does_not_depend_on_the_number_of_rows_or_the_neighbours(
    ops: TorchOperators, n: int, k: int
) -> None:
    torch.manual_seed(0)
    weight = ops.linear_weight(torch.randn(n, k))
    x = torch.randn(65, k)
    whole = ops.linear(x, weight)
    for rows in ROWS:
        assert torch.equal(ops.linear(x[:rows], weight), whole[:rows])
        assert torch.equal(ops.linear(x[-rows:], weight), whole[-rows:])
    for neighbour in (torch.zeros(k), torch.randn(k) * 1e4):
        crowd = neighbour.repeat(9, 1)
        crowd[5] = x[7]
        assert torch.equal(ops.linear(crowd, weight)[5], whole[7])


def test_pointwise_operators_do_not_depend_on_the_number_of_rows(ops: TorchOperators) -> None:
    torch.manual_seed(0)
    x = torch.randn(65, 2 * 90) * 4
    weight = torch.rand(180)
    for operate in (
        ops.silu_mul,
        ops.gelu_mul,
        ops.log_softmax,
        lambda t: ops.rms_norm(t, weight, 1e-6),
        lambda t: ops.add_rms_norm(t, t * 0.5, weight, 1e-6)[0],
    ):
        whole = operate(x)
        for rows in ROWS:
            assert torch.equal(operate(x[:rows]), whole[:rows])
            assert torch.equal(operate(x[-rows:]), whole[-rows:])


def test_a_fused_residual_norm_equals_its_two_parts(ops: TorchOperators) -> None:
    x, residual, weight = torch.randn(5, 48), torch.randn(5, 48), torch.rand(48)
    normed, total = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(normed, ops.rms_norm(total, weight, 1e-5))


def test_log_softmax_of_a_single_long_row_equals_the_same_row_in_a_batch(ops: TorchOperators) -> None:
    x = torch.randn(4, 49153)
    assert torch.equal(ops.log_softmax(x[2:3]), ops.log_softmax(x)[2:3])


@pytest.mark.parametrize("length", [1, PAGE - 1, PAGE, PAGE + 1, 3 * PAGE + 7])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (70, None), (None, 30.0)])
def test_attention_is_the_same_whole_chunked_and_among_strangers(
    ops: TorchOperators, length: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(length)
    heads, groups, size, count = 6, 2, 16, 12
    query = torch.randn(length, heads, size)
    key, value = torch.randn(length, groups, size), torch.randn(length, groups, size)
    pages = [5, 2, 9, 0][: -(-length // PAGE)]

    def run(keys: torch.Tensor, values: torch.Tensor, start: int, size_: int, *, crowd: bool) -> torch.Tensor:
        mine = Span(1, [0] * size_, start, pages)
        other = Span(2, [0] * 3, 0, [11])
        batch = RaggedBatch.build([other, mine] if crowd else [mine])
        first = 3 if crowd else 0
        rows = slice(start, start + size_)
        noise = torch.randn(first, heads, size)
        k = torch.cat([noise[:, :groups], key[rows]])
        ops.write_pages(k, torch.cat([noise[:, :groups] * 1e3, value[rows]]), keys, values, batch)
        q = torch.cat([noise, query[rows]])
        return ops.attention(q, keys, values, batch, scale=0.25, window=window, softcap=softcap)[first:]

    def pool() -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((count, groups, PAGE, size), torch.nan), torch.full((count, groups, PAGE, size), torch.nan)

    whole = run(*pool(), 0, length, crowd=False)
    assert torch.isfinite(whole).all()
    for chunk in (1, 3, 17, 64):
        if length > 70 and chunk == 1:
            continue
        keys, values = pool()
        parts = [run(keys, values, start, min(chunk, length - start), crowd=True) for start in range(0, length, chunk)]
        assert torch.equal(torch.cat(parts), whole)


def test_attention_agrees_with_the_plain_definition(ops: TorchOperators) -> None:
    torch.manual_seed(3)
    length, heads, groups, size = 100, 4, 2, 16
    query = torch.randn(length, heads, size)
    key, value = torch.randn(length, groups, size), torch.randn(length, groups, size)
    keys, values = torch.zeros(2, groups, PAGE, size), torch.zeros(2, groups, PAGE, size)
    batch = RaggedBatch.build([Span(1, [0] * length, 0, [1, 0])])
    ops.write_pages(key, value, keys, values, batch)
    ours = ops.attention(query, keys, values, batch, scale=0.3).view(length, heads, size)
    q, k, v = (t.double().transpose(0, 1) for t in (query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)))
    scores = (q @ k.transpose(1, 2) * 0.3).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    assert (ours - (scores.softmax(-1) @ v).transpose(0, 1)).abs().max() < 1e-5


def test_bf16_is_exactly_float32_arithmetic_on_rounded_weights() -> None:
    weight, x = torch.randn(40, 48), torch.randn(3, 48)
    bf16, fp32 = TorchOperators("bf16", 1), TorchOperators("fp32", 1)
    rounded = weight.to(torch.bfloat16).float()
    ours = bf16.linear(x, bf16.linear_weight(weight))
    assert torch.equal(ours, fp32.linear(x, fp32.linear_weight(rounded)))


def test_a_quantised_profile_is_refused_with_the_profiles_that_work() -> None:
    with pytest.raises(UsageError, match="fp32 or bf16"):
        TorchOperators("int8", 1)
