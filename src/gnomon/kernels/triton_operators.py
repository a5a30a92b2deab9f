"""The canonical operators on a GPU: Triton kernels for every reduction, torch for what goes element by element.

A numeric profile of its own ("triton"): fp32 multiplies in full float32 (never TF32), bf16 rounds activations too and
adds in float32. Inputs may lie on the CPU and are moved; results stay on the device. Not run on real hardware yet: the
tests run it on the CPU in Triton's interpreter.
Legend: T rows, K inputs, N outputs, H query heads, G key-value heads, D head size.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from gnomon.errors import MissingExtra, UsageError
from gnomon.kernels.batch import PAGE, RaggedBatch
from gnomon.kernels.layers import LayerPlan, LayersRun, LayersShape
from gnomon.kernels.operators import LinearWeight, QuantizedTensor

TILES = {"fp32": (64, 64, 32), "bf16": (128, 128, 64)}
"""BLOCK_M, BLOCK_N, BLOCK_K: part of the profile, the same for one row and for ten thousand."""
ATTENTION_ROWS = 16
VOCABULARY_BLOCK = 1024
VERSION = 1
"""Raised whenever a definition in triton_kernels.py changes by a bit."""


class TritonOperators:
    """Implements `Operators` on one device."""

    kernel = "triton"
    storage = torch.float32

    def __init__(self, dtype: str, device: str = "cuda") -> None:
        if dtype not in TILES:
            raise UsageError(
                f"The profile `{dtype}` has no GPU kernels.", hint="On a GPU: fp32 or bf16.", param="profile"
            )
        try:
            import triton

            from gnomon.kernels import triton_kernels
        except ImportError:
            raise MissingExtra(f"device `{device}`", "cuda") from None
        if device != "cpu" and not torch.cuda.is_available():
            raise UsageError(
                f"device `{device}`: torch {torch.__version__} sees no CUDA device here.",
                hint="Use --device cpu, or install torch's CUDA build on a machine with a GPU.",
                param="device",
            )
        self.kernels: Any = triton_kernels
        self.triton_version: str = triton.__version__
        self.dtype = dtype
        self.device = torch.device(device)
        self.threads = torch.get_num_threads()
        self.programs = 1
        if self.device.type == "cuda":
            self.programs = torch.cuda.get_device_properties(self.device).multi_processor_count
        self._moved: Any = WeakIdKeyDictionary()

    def use_threads(self, count: int) -> None:
        self.threads = count

    def description(self) -> dict[str, object]:
        """Bits follow from the tiles, the compiler and the kind of processor."""
        name = "interpreter" if self.device.type == "cpu" else torch.cuda.get_device_name(self.device)
        return {"version": VERSION, "triton": self.triton_version, "device": name, "tiles": list(TILES[self.dtype])}

    def zeros(self, shape: tuple[int, ...]) -> Tensor:
        """Pages of keys or values."""
        return torch.zeros(shape, device=self.device)

    def free_memory(self) -> int:
        """Bytes free on the device."""
        return int(torch.cuda.mem_get_info(self.device)[0])

    def linear_weight(self, weight: Tensor | QuantizedTensor) -> LinearWeight:
        if isinstance(weight, QuantizedTensor):
            raise UsageError("The GPU kernels do not run quantised blocks.", param="profile")
        data = weight.to(self.device, self._held).contiguous()
        return LinearWeight(n=data.shape[0], k=data.shape[1], data=data, tensor=None)

    @property
    def _held(self) -> torch.dtype:
        return torch.bfloat16 if self.dtype == "bf16" else torch.float32

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        x_TK = self._on(x_TK).to(self._held).contiguous()
        rows, (tall, wide, deep) = x_TK.shape[0], TILES[self.dtype]
        y_TN = torch.empty(rows, weight.n, device=self.device)
        bias = None if bias_N is None else self._on(bias_N).float().contiguous()
        tiles = -(-rows // tall) * -(-weight.n // wide)
        programs = max(1, min(self.programs, tiles))
        self.kernels.linear_kernel[(programs,)](
            x_TK, weight.data, y_TN if bias is None else bias, y_TN, rows, weight.n, weight.k,
            PROGRAMS=programs, BLOCK_M=tall, BLOCK_N=wide, BLOCK_K=deep, BIASED=bias is not None,
            WIDEN=self.device.type == "cpu",
        )  # fmt: skip
        return y_TN

    def embedding(self, table: LinearWeight, token_ids_T: Tensor) -> Tensor:
        rows: Tensor = table.data.index_select(0, self._on(token_ids_T))
        return rows.float()

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        x_TK = self._on(x_TK).float().contiguous()
        size = x_TK.shape[-1]
        y_TK = torch.empty_like(x_TK)
        block = 1 << (size - 1).bit_length()
        self.kernels.rms_norm_kernel[(x_TK.numel() // size,)](x_TK, self._on(weight_K), y_TK, size, eps, BLOCK=block)
        return y_TK

    def add_rms_norm(self, x_TK: Tensor, residual_TK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = self._on(x_TK) + self._on(residual_TK)
        return self.rms_norm(total, weight_K, eps), total

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        half = cos_TR.shape[-1]
        x_THD, cos, sin = self._on(x_THD), self._on(cos_TR)[:, None, :], self._on(sin_TR)[:, None, :]
        first, second, rest = x_THD[..., :half], x_THD[..., half : 2 * half], x_THD[..., 2 * half :]
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = self._on(gate_up_T2F).chunk(2, dim=-1)
        gate = gate.contiguous()
        return gate * (1.0 / (1.0 + torch.exp(-gate))) * up

    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        gate, up = self._on(gate_up_T2F).chunk(2, dim=-1)
        gate = gate.contiguous()
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1.0 + (1.0 - 2.0 / (1.0 + torch.exp(2.0 * inner)))) * up

    def write_pages(self, key_TGD: Tensor, value_TGD: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> None:
        slots_T = self._on(batch.slots_T)
        keys[slots_T // PAGE, :, slots_T % PAGE] = self._on(key_TGD)
        values[slots_T // PAGE, :, slots_T % PAGE] = self._on(value_TGD)

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
        query_THD = self._on(query_THD).float().contiguous()
        rows, heads, size = query_THD.shape
        groups = keys.shape[1]
        out = torch.empty_like(query_THD)
        first, count, sequence = self._tiles(batch)
        each = heads // groups
        pairs, width = max(16, 1 << (ATTENTION_ROWS * each - 1).bit_length()), max(16, 1 << (size - 1).bit_length())
        tables = self._on(batch.page_tables_SP)
        self.kernels.attention_kernel[(len(first), groups)](
            query_THD, keys, values, tables, self._on(batch.positions_T), first, count, sequence, out,
            scale, window or 0, softcap or 0.0, groups, tables.shape[1],
            H=each, D=size, ROWS=ATTENTION_ROWS, PAIRS=pairs, WIDTH=width, PAGE=PAGE,
            WINDOWED=bool(window), CAPPED=bool(softcap),
        )  # fmt: skip
        return out.reshape(rows, heads * size)

    def _tiles(self, batch: RaggedBatch) -> tuple[Tensor, Tensor, Tensor]:
        """First row, number of rows and sequence of each tile. Kept with the batch: layers share them."""
        known = self._moved.get(batch.starts_S)
        if known is None:
            bounds = batch.starts_S.tolist()
            tiles = [
                (row, min(ATTENTION_ROWS, high - row), index)
                for index, (low, high) in enumerate(pairwise(bounds))
                for row in range(low, high, ATTENTION_ROWS)
            ]
            known = tuple(
                torch.tensor(part, dtype=torch.int32, device=self.device) for part in zip(*tiles, strict=True)
            )
            self._moved[batch.starts_S] = known
        return known  # type: ignore[no-any-return]

    def layers(self, plans: list[LayerPlan], shape: LayersShape) -> LayersRun | None:
        return None

    def log_softmax(self, logits_RV: Tensor) -> Tensor:
        x_RV = self._on(logits_RV).float().contiguous()
        y_RV = torch.empty_like(x_RV)
        rows, size = x_RV.shape
        self.kernels.log_softmax_kernel[(rows,)](x_RV, y_RV, size, BLOCK=VOCABULARY_BLOCK)
        return y_RV

    def _on(self, tensor: Tensor) -> Tensor:
        """On the device; what was moved once is not moved again while it lives unchanged."""
        if tensor.device == self.device or tensor.device.type == self.device.type == "cpu":
            return tensor
        version = 0 if tensor.is_inference() else tensor._version
        known = self._moved.get(tensor)
        if known is None or known[0] != version:
            known = (version, tensor.to(self.device))
            self._moved[tensor] = known
        return known[1]  # type: ignore[no-any-return]
