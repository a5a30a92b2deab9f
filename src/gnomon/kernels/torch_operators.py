"""The canonical operators on plain torch: batch-invariant wherever torch runs, no compiler needed.

Stock CPU kernels change their arithmetic with the number of rows (one-row products, unaligned tails; how many rows are
few differs from processor to processor). Here every product with a weight is made of products of exactly ROWS rows,
attention pads its rows to multiples of ROWS, uses fixed key blocks of PAGE with the exact maximum and adds blocks in
order, and gated activations are composed of primitives that do not depend on length.
The bits are an observation about one torch build, so its version is part of the numeric profile.
Legend: T rows, K inputs, N outputs, H query heads, G key-value heads, D head size, S sequences, R rows of each,
P pages, M = R * H / G padded rows of one key-value head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.kernels.batch import PAGE, RaggedBatch
from gnomon.kernels.layers import LayerPlan, LayersRun, LayersShape
from gnomon.kernels.operators import LinearWeight, QuantizedTensor

ROWS = 16
"""Rows of every product. MKL takes other kernels for few rows: below 4 on older processors, below 16 on Sapphire
Rapids, which with two threads divides long sums otherwise for 64 rows than for 32."""


class TorchOperators:
    """Implements `Operators` in float32; the bf16 profile rounds the weights and computes in float32 (LayerCast)."""

    kernel = "torch"
    storage = torch.float32

    def __init__(self, dtype: str, threads: int) -> None:
        if dtype not in ("fp32", "bf16"):
            raise UsageError(
                f"The profile `{dtype}` needs the native kernels, which this installation lacks.",
                hint="Use fp32 or bf16; `gnomon doctor` says why the native kernels are missing.",
                param="profile",
            )
        self.dtype = dtype
        self.threads = threads
        torch.set_num_threads(threads)

    def use_threads(self, count: int) -> None:
        self.threads = count
        torch.set_num_threads(count)

    def description(self) -> dict[str, object]:
        """What, besides the weights, can change a bit of these operators: part of the numeric profile."""
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": self.threads,
            "rows": ROWS,
        }

    def linear_weight(self, weight: Tensor | QuantizedTensor) -> LinearWeight:
        if isinstance(weight, QuantizedTensor):
            raise UsageError("The torch kernels do not run quantised blocks.", param="profile")
        if self.dtype == "bf16":
            # Rounded once; kept widened, because torch's bf16 product rounds its activations too.
            weight = weight.to(torch.bfloat16)
        data = weight.to(torch.float32).contiguous()
        return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=data)

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        rows = x_TK.shape[0]
        x_TK = torch.nn.functional.pad(x_TK, (0, 0, 0, -rows % ROWS))
        y_TN = x_TK.new_empty(x_TK.shape[0], weight.n)
        for first in range(0, rows, ROWS):
            torch.mm(x_TK[first : first + ROWS], weight.data.t(), out=y_TN[first : first + ROWS])
        y_TN = y_TN[:rows]
        return y_TN if bias_N is None else y_TN + bias_N

    def embedding(self, table: LinearWeight, token_ids_T: Tensor) -> Tensor:
        rows: Tensor = table.data.index_select(0, token_ids_T)
        return rows

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        mean = (x_TK * x_TK).mean(dim=-1, keepdim=True)
        return x_TK * (1.0 / torch.sqrt(mean + eps)) * weight_K

    def add_rms_norm(self, x_TK: Tensor, residual_TK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x_TK + residual_TK
        return self.rms_norm(total, weight_K, eps), total

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        half = cos_TR.shape[-1]
        cos, sin = cos_TR[:, None, :], sin_TR[:, None, :]
        first, second, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        gate = gate.contiguous()
        return gate * (1.0 / (1.0 + torch.exp(-gate))) * up

    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = gate_up_T2F.chunk(2, dim=-1)
        gate = gate.contiguous()
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        tanh = 1.0 - 2.0 / (1.0 + torch.exp(2.0 * inner))
        return 0.5 * gate * (1.0 + tanh) * up

    def write_pages(self, key_TGD: Tensor, value_TGD: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> None:
        page_T = batch.slots_T // PAGE
        offset_T = batch.slots_T % PAGE
        keys[page_T, :, offset_T] = key_TGD
        values[page_T, :, offset_T] = value_TGD

    def attention(
        self,
        query_THD: Tensor,
        keys: Tensor,
        values: Tensor,
        batch: RaggedBatch,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
    ) -> Tensor:
        rows, heads, size = query_THD.shape
        out_THD = query_THD.new_empty(rows, heads, size)
        for indices in _groups_of_equal_rows(batch):
            first = [int(batch.starts_S[i]) for i in indices]
            count = int(batch.starts_S[indices[0] + 1]) - first[0]
            row_SR = torch.tensor(first)[:, None] + torch.arange(count)
            pages = max(len(batch.spans[i].pages) for i in indices)
            out_THD[row_SR] = _attend(
                query_THD[row_SR],
                keys[batch.page_tables_SP[indices, :pages].long()],
                values[batch.page_tables_SP[indices, :pages].long()],
                batch.positions_T[row_SR],
                batch.contexts_S[indices].long(),
                scale=scale,
                window=window,
                softcap=softcap,
            )
        return out_THD.reshape(rows, heads * size)

    def layers(self, plans: list[LayerPlan], shape: LayersShape) -> LayersRun | None:
        return None

    def log_softmax(self, logits_RV: Tensor) -> Tensor:
        return torch.log_softmax(logits_RV, dim=-1)


def _groups_of_equal_rows(batch: RaggedBatch) -> list[list[int]]:
    """Sequences with one new token go together; every longer one goes alone."""
    single = [i for i, span in enumerate(batch.spans) if len(span.token_ids) == 1]
    longer = [[i] for i, span in enumerate(batch.spans) if len(span.token_ids) > 1]
    return ([single] if single else []) + longer


def _attend(
    query_SRHD: Tensor,
    key_SPGBD: Tensor,
    value_SPGBD: Tensor,
    position_SR: Tensor,
    context_S: Tensor,
    *,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Attention of R rows of S sequences over their pages -> [S, R, H, D]. Every product is [M, D] x [D, PAGE]."""
    sequences, rows, heads, size = query_SRHD.shape
    pages, groups = key_SPGBD.shape[1], key_SPGBD.shape[2]
    per_group = heads // groups
    q_SGMD = query_SRHD.reshape(sequences, rows, groups, per_group, size).permute(0, 2, 1, 3, 4)
    q_SGMD = q_SGMD.reshape(sequences, groups, rows * per_group, size)
    padding = -(rows * per_group) % ROWS
    q_SGMD = torch.nn.functional.pad(q_SGMD, (0, 0, 0, padding))
    k_SGPDB = key_SPGBD.permute(0, 2, 1, 4, 3)
    key_position_PB = torch.arange(pages * PAGE).reshape(pages, PAGE)
    written_SPB = key_position_PB < context_S[:, None, None]
    # What was never written may be anything, and 0 * NaN is NaN.
    v_SGPBD = torch.where(written_SPB[:, :, None, :, None], value_SPGBD, 0.0).permute(0, 2, 1, 3, 4)
    scores = torch.matmul(q_SGMD[:, :, None], k_SGPDB) * scale  # [S, G, P, M, B]
    if softcap is not None:
        inner = torch.exp(scores * (2.0 / softcap))
        scores = softcap * (1.0 - 2.0 / (1.0 + inner))
    position_SM = torch.nn.functional.pad(position_SR.repeat_interleave(per_group, dim=1), (0, padding))
    distance_SPMB = position_SM[:, None, :, None] - key_position_PB[None, :, None, :]
    seen_SPMB = distance_SPMB >= 0
    if window is not None:
        seen_SPMB &= distance_SPMB < window
    scores = torch.where(seen_SPMB[:, None], scores, float("-inf"))
    top = scores.amax(dim=(2, 4), keepdim=True)
    weights = torch.exp(scores - top)
    sums = weights.sum(dim=-1)  # [S, G, P, M]: each block of PAGE keys alone
    blocks = torch.matmul(weights, v_SGPBD)  # [S, G, P, M, D]
    total = torch.zeros_like(sums[:, :, 0])
    out_SGMD = torch.zeros_like(blocks[:, :, 0])
    for page in range(pages):  # strictly in block order; a masked block adds exact zeros
        total = total + sums[:, :, page]
        out_SGMD = out_SGMD + blocks[:, :, page]
    out_SGMD = (out_SGMD / total[..., None])[:, :, : rows * per_group]
    out = out_SGMD.reshape(sequences, groups, rows, per_group, size).permute(0, 2, 1, 3, 4)
    return out.reshape(sequences, rows, heads, size)
