"""The canonical operators in C++ (csrc/): the same bits on every instruction set, thread count and batch.

A reduction is sixteen float32 lanes with fused multiply-adds and one fixed tree; exp is our own polynomial. fp32 and
bf16 weights stay in torch's row-major memory, widened in registers (LayerCast), so `module()` can share them; int8 and
gguf weights lie in panels (csrc/quantized.h), multiplied with activations rounded to bytes per row and group.
Legend: T rows, K inputs, N outputs, H query heads, G key-value heads, D head size, R = half the rotated channels.
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.kernels import _native
from gnomon.kernels.batch import PAGE, RaggedBatch
from gnomon.kernels.blocks import INT8_KIND, Parts, block_type, int8_parts, parts_of
from gnomon.kernels.layers import LayerPlan, LayersRun, LayersShape
from gnomon.kernels.native_layers import NativeLayers, NativeWeight, native_weight
from gnomon.kernels.operators import LinearWeight, QuantizedTensor

unavailable_reason = _native.unavailable_reason
pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "gnomon_linear": [pointer, ctypes.POINTER(NativeWeight), integer, pointer, integer, integer],
    "gnomon_pack": [integer] + [pointer] * 4 + [integer] * 2,
    "gnomon_packed_size": [integer] * 3,
    "gnomon_unpack_rows": [integer] + [pointer] * 2 + [integer, pointer, integer],
    "gnomon_layers": [pointer, integer] + [pointer] * 6 + [integer],
    "gnomon_rms_norm": [pointer] * 3 + [integer] * 2 + [real],
    "gnomon_add_rms_norm": [pointer] * 5 + [integer] * 2 + [real],
    "gnomon_rotary": [pointer] * 4 + [integer] * 4,
    "gnomon_silu_mul": [pointer] * 2 + [integer] * 2,
    "gnomon_gelu_mul": [pointer] * 2 + [integer] * 2,
    "gnomon_attention": [pointer] * 7 + [integer] * 5 + [real, integer, real],
    "gnomon_exp": [pointer] * 2 + [integer],
    "gnomon_threads": [ctypes.c_int],
}


RESULTS = {"gnomon_packed_size": integer, "gnomon_linear": ctypes.c_int, "gnomon_layers": ctypes.c_int}
DTYPES = ("fp32", "bf16", "int8", "gguf")


class NativeOperators:
    """Implements `Operators`. isa: for tests; the numeric profile does not contain it, because the bits do not."""

    kernel = "native"

    def __init__(self, dtype: str, threads: int, *, isa: str | None = None) -> None:
        if dtype not in DTYPES:
            raise UsageError(f"Unknown profile `{dtype}`.", hint=f"Known: {', '.join(DTYPES)}.", param="profile")
        self.dtype = dtype
        self.storage = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.library = _native.open_library(isa)
        for name, arguments in SIGNATURES.items():
            getattr(self.library, name).argtypes = arguments
            getattr(self.library, name).restype = RESULTS.get(name)
        self.library.gnomon_isa.restype = ctypes.c_char_p
        self.instruction_set: str = self.library.gnomon_isa().decode()
        self.use_threads(threads)

    def use_threads(self, count: int) -> None:
        self.threads = count
        self.library.gnomon_threads(count)
        torch.set_num_threads(count)

    def description(self) -> dict[str, object]:
        """The version of the definitions: all that can change a bit."""
        return {"version": int(self.library.gnomon_kernel_version())}

    def linear_weight(self, weight: Tensor | QuantizedTensor) -> LinearWeight:
        if isinstance(weight, QuantizedTensor):
            return self._packed(block_type(weight.type_name).kind, parts_of(weight.rows.numpy(), weight.type_name))
        if self.dtype == "int8":
            return self._packed(INT8_KIND, int8_parts(weight.float().numpy()))
        data = weight.to(self.storage).contiguous()
        return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=data, kind=int(self.dtype == "bf16"))

    def _packed(self, kind: int, parts: Parts) -> LinearWeight:
        n, k = parts.q.shape
        data = torch.empty(self.library.gnomon_packed_size(kind, n, k), dtype=torch.uint8)
        q, scales = np.ascontiguousarray(parts.q), np.ascontiguousarray(parts.scales)
        minima = None if parts.minima is None else np.ascontiguousarray(parts.minima)
        least = None if minima is None else minima.ctypes.data
        self.library.gnomon_pack(kind, q.ctypes.data, scales.ctypes.data, least, data.data_ptr(), n, k)
        return LinearWeight(n=n, k=k, data=data, tensor=None, kind=kind)

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        x_TK = _ready(x_TK)
        rows = x_TK.shape[0]
        y_TN = torch.empty(rows, weight.n)
        bias = None if bias_N is None else _ready(bias_N)
        native = native_weight(weight, bias)
        self.library.gnomon_linear(x_TK.data_ptr(), native, 1, y_TN.data_ptr(), weight.n, rows)
        return y_TN

    def embedding(self, table: LinearWeight, token_ids_T: Tensor) -> Tensor:
        if table.kind in (0, 1):
            rows: Tensor = table.data.index_select(0, token_ids_T)
            return rows.to(torch.float32)
        ids = token_ids_T.to(torch.int64).contiguous()
        out = torch.empty(len(ids), table.k)
        data, count = table.data.data_ptr(), len(ids)
        self.library.gnomon_unpack_rows(table.kind, data, ids.data_ptr(), count, out.data_ptr(), table.k)
        return out

    def layers(self, plans: list[LayerPlan], shape: LayersShape) -> LayersRun | None:
        return NativeLayers(self.library, plans, shape)

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
