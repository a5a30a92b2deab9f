"""The canonical operators: what every network of the house is built on.

Each output element's arithmetic order is fixed by the model's shape and the numeric profile alone, never by the
number of rows, their position, their neighbours, the chunking or the thread count
(Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025). Two implementations stand behind this
interface: `torch_operators` (everywhere torch runs) and `native_operators` (our C++ kernels).
Legend: T rows (tokens), K inputs, N outputs, H query heads, G key-value heads, D head size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from gnomon.kernels.batch import RaggedBatch

if TYPE_CHECKING:
    from gnomon.kernels.layers import LayerPlan, LayersRun, LayersShape


@dataclass(frozen=True)
class QuantizedTensor:
    """A weight's quantised blocks as they lie in the file. rows: [N, bytes per row] uint8; type_name: "Q4_1", ..."""

    rows: Tensor
    shape: tuple[int, int]
    type_name: str


@dataclass(frozen=True)
class LinearWeight:
    """One [N, K] weight in the layout of its operators; `data` is theirs alone.

    `tensor` is torch's own row-major view of the same memory where the profile has one (fp32, bf16), else None.
    """

    n: int
    k: int
    data: Any
    tensor: Tensor | None
    kind: int = 0
    """How `data` lies, for operators that have several layouts."""


class Operators(Protocol):
    """Everything a decoder needs. Tensors are contiguous float32 unless said otherwise; results are new tensors."""

    kernel: str
    """"native" | "torch": part of the numeric profile."""
    dtype: str
    """"fp32" | "bf16" | "int8" | "gguf": how weights are held and multiplied."""

    storage: torch.dtype
    """How the profile's weights lie in memory: what `module()` shares."""

    threads: int

    def use_threads(self, count: int) -> None:
        """Work with this many threads from now on."""

    def description(self) -> dict[str, object]:
        """What, besides weights and dtype, can change a bit: kernel version, or library versions and CPU class."""

    def linear_weight(self, weight: Tensor | QuantizedTensor) -> LinearWeight:
        """Lay out an [N, K] weight for `linear`. Raises UnsupportedModel for a block type the profile cannot run."""

    def linear(self, x_TK: Tensor, weight: LinearWeight, bias_N: Tensor | None = None) -> Tensor:
        """x W^T + b -> [T, N]; accumulated in float32 in one fixed order per element."""

    def embedding(self, table: LinearWeight, token_ids_T: Tensor) -> Tensor:
        """Rows of the table, widened to float32 -> [T, K]."""

    def rms_norm(self, x_TK: Tensor, weight_K: Tensor, eps: float) -> Tensor:
        """x / sqrt(mean(x^2) + eps) * w over the last axis. x may be [..., K]."""

    def add_rms_norm(self, x_TK: Tensor, residual_TK: Tensor, weight_K: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual), bit-equal to the two done apart."""

    def rotary(self, x_THD: Tensor, cos_TR: Tensor, sin_TR: Tensor) -> Tensor:
        """Rotate halves ("NeoX" pairing i, i + R) of the first 2R channels of each head; the rest pass through."""

    def silu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """silu(first half) * second half -> [T, F]."""

    def gelu_mul(self, gate_up_T2F: Tensor) -> Tensor:
        """gelu_tanh(first half) * second half -> [T, F]."""

    def write_pages(self, key_THD: Tensor, value_THD: Tensor, keys: Tensor, values: Tensor, batch: RaggedBatch) -> None:
        """Write this step's keys and values ([T, G, D]) into the pages ([pages, G, PAGE, D]) in place."""

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
        """Causal attention over pages with absolute key blocks of PAGE, exact maximum -> [T, H * D].

        A row at position p sees keys max(0, p - window + 1)..p; keys: [pages, G, PAGE, D] float32.
        """

    def layers(self, plans: list[LayerPlan], shape: LayersShape) -> LayersRun | None:
        """These layers as one call, bit-equal to the operators one by one; None where there is no such thing."""

    def log_softmax(self, logits_RV: Tensor) -> Tensor:
        """log softmax over the vocabulary, each row alone -> [R, V] float32."""
