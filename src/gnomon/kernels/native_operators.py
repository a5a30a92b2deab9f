"""The canonical operators in C++ (csrc/): the same bits on every instruction set, thread count and batch.

A reduction is sixteen float32 lanes with fused multiply-adds and one fixed tree; exp is our own polynomial. Weights
stay in torch's row-major memory, float32 or bfloat16 widened in registers (LayerCast), so `module()` can share them.
Legend: T rows, K inputs, N outputs, H query heads, G key-value heads, D head size, R = half the rotated channels.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.kernels import _native
from gnomon.kernels.batch import PAGE, RaggedBatch
from gnomon.kernels.operators import LinearWeight, QuantizedTensor

unavailable_reason = _native.unavailable_reason
pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "gnomon_linear_f32": [pointer] * 4 + [integer] * 3,
    "gnomon_linear_bf16": [pointer] * 4 + [integer] * 3,
    "gnomon_rms_norm": [pointer] * 3 + [integer] * 2 + [real],
    "gnomon_add_rms_norm": [pointer] * 5 + [integer] * 2 + [real],
    "gnomon_rotary": [pointer] * 4 + [integer] * 4,
    "gnomon_silu_mul": [pointer] * 2 + [integer] * 2,
    "gnomon_gelu_mul": [pointer] * 2 + [integer] * 2,
    "gnomon_attention": [pointer] * 7 + [integer] * 5 + [real, integer, real],
    "gnomon_exp": [pointer] * 2 + [integer],
    "gnomon_threads": [ctypes.c_int],
}


class NativeOperators:
    """Implements `Operators`. isa: for tests; the numeric profile does not contain it, because the bits do not."""

    kernel = "native"

    def __init__(self, dtype: str, threads: int, *, isa: str | None = None) -> None:
        if dtype not in ("fp32", "bf16"):
            raise UsageError(f"The profile `{dtype}` is not there yet.", hint="Use fp32 or bf16.", param="profile")
        self.dtype = dtype
        self.storage = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.threads = threads
        self.library = _native.open_library(isa)
        for name, arguments in SIGNATURES.items():
            getattr(self.library, name).argtypes = arguments
            getattr(self.library, name).restype = None
        self._linear = self.library.gnomon_linear_bf16 if dtype == "bf16" else self.library.gnomon_linear_f32
        self.library.gnomon_threads(threads)
        torch.set_num_threads(threads)

    def description(self) -> dict[str, object]:
        """The version of the definitions: all that can change a bit."""
        return {"version": int(self.library.gnomon_kernel_version())}

    def linear_weight(self, weight: Tensor | QuantizedTensor) -> LinearWeight:
        if isinstance(weight, QuantizedTensor):
            raise UsageError("The profiles fp32 and bf16 do not run quantised blocks.", param="profile")
        data = weight.to(self.storage).contiguous()
        return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=data)

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        x_TK = _ready(x_TK)
        rows = x_TK.shape[0]
        y_TN = torch.empty(rows, weight.n)
        bias = None if bias_N is None else _ready(bias_N).data_ptr()
        self._linear(x_TK.data_ptr(), weight.data.data_ptr(), bias, y_TN.data_ptr(), rows, weight.k, weight.n)
        return y_TN

    def embedding(self, table: LinearWeight, token_ids_T: Tensor) -> Tensor:
        rows: Tensor = table.data.index_select(0, token_ids_T)
        return rows.to(torch.float32)

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        x_TK = _ready(x_TK)
        y_TK = torch.empty_like(x_TK)
        size = x_TK.shape[-1]
        rows = x_TK.numel() // size
        self.library.gnomon_rms_norm(x_TK.data_ptr(), weight_K.data_ptr(), y_TK.data_ptr(), rows, size, eps)
        return y_TK

    def add_rms_norm(self, x_TK: Tensor, residual_TK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        x_TK, residual_TK = _ready(x_TK), _ready(residual_TK)
        y_TK, total_TK = torch.empty_like(x_TK), torch.empty_like(x_TK)
        rows, size = x_TK.shape
        self.library.gnomon_add_rms_norm(
            x_TK.data_ptr(),
            residual_TK.data_ptr(),
            weight_K.data_ptr(),
            y_TK.data_ptr(),
            total_TK.data_ptr(),
            rows,
            size,
            eps,
        )
        return y_TK, total_TK

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        x_THD, cos_TR, sin_TR = _ready(x_THD), _ready(cos_TR), _ready(sin_TR)
        y_THD = torch.empty_like(x_THD)
        rows, heads, size = x_THD.shape
        self.library.gnomon_rotary(
            x_THD.data_ptr(),
            cos_TR.data_ptr(),
            sin_TR.data_ptr(),
            y_THD.data_ptr(),
            rows,
            heads,
            size,
            cos_TR.shape[-1],
        )
        return y_THD

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return self._gate(self.library.gnomon_silu_mul, gate_up_T2F)

    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        return self._gate(self.library.gnomon_gelu_mul, gate_up_T2F)

    def _gate(self, kernel: ctypes._NamedFuncPointer, gate_up_T2F: Tensor) -> Tensor:
        gate_up_T2F = _ready(gate_up_T2F)
        rows, size = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
        y_TF = torch.empty(rows, size)
        kernel(gate_up_T2F.data_ptr(), y_TF.data_ptr(), rows, size)
        return y_TF

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
        query_THD = _ready(query_THD)
        rows, heads, size = query_THD.shape
        out = torch.empty(rows, heads * size)
        self.library.gnomon_attention(
            query_THD.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            batch.page_tables_SP.data_ptr(),
            batch.sequences_T.data_ptr(),
            batch.positions_T.data_ptr(),
            out.data_ptr(),
            rows,
            heads,
            keys.shape[1],
            size,
            batch.page_tables_SP.shape[1],
            scale,
            window or 0,
            softcap or 0.0,
        )
        return out

    def log_softmax(self, logits_RV: Tensor) -> Tensor:
        return torch.log_softmax(logits_RV, dim=-1)


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous float32, as the library reads it."""
    return tensor.to(torch.float32).contiguous()
