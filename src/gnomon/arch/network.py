"""Network: what the engine's runner drives, and how a checkpoint becomes one.

Token ids and pages in, hidden states and logits out. Knows nothing of requests or text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

from torch import Tensor

from gnomon.arch.config import FAMILIES
from gnomon.kernels.batch import RaggedBatch
from gnomon.kernels.operators import Operators
from gnomon.kernels.side import SidePath, SideRows
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.wrapper import Wrapper

Pages = list[tuple[Tensor, Tensor]]
"""Per layer: keys and values, float32 [pages, G, PAGE, D]."""
NONE: Mapping[str, Wrapper] = MappingProxyType({})
"""No wrappers."""


def copy_page(pages: Pages, source: int, target: int) -> None:
    """One page's keys and values to another page, in every layer."""
    for keys, values in pages:
        keys[target].copy_(keys[source])
        values[target].copy_(values[source])


class Network(Protocol):
    """A decoder. Legend: T packed tokens, R rows, C hidden channels, V vocabulary."""

    architecture: str
    vocab_size: int
    hidden_size: int
    max_context: int
    page_bytes: int
    """Bytes of one page over all layers."""

    def new_pages(self, count: int) -> Pages:
        """Zeroed pages for `count` x PAGE tokens."""

    def forward(self, batch: RaggedBatch, pages: Pages) -> Tensor:
        """Run the batch's tokens, writing their keys and values -> final hidden states [T, C], norm applied."""

    def logits(self, hidden_RC: Tensor, sides: Sequence[SideRows] = ()) -> Tensor:
        """-> [R, V] float32. sides: rows whose patches change the head."""

    def side_path(
        self, factors: Mapping[str, tuple[Tensor, Tensor]], wrappers: Mapping[str, Wrapper] = NONE
    ) -> SidePath:
        """Low-rank deltas by tensor name (up [N, r], down [r, K]) and wrappers, laid out to run beside the weights.

        Raises PatchError for a tensor that cannot be patched this way (a norm, a bias), a wrapper that does not fit.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Hugging Face name -> a view of the live weight. Raises UsageError for packed profiles."""

    def refresh(self) -> None:
        """Live weights were changed in place: bring what is derived from them up to date."""


def build_network(checkpoint: Checkpoint, operators: Operators) -> Network:
    """The decoder for a checkpoint: ours where the family is known, otherwise transformers' (slower, and it says so).

    Raises UnsupportedModel, CheckpointError for a missing or misshapen tensor, MissingExtra.
    """
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    if architecture in FAMILIES:
        from gnomon.arch.decoder import Decoder

        return Decoder(checkpoint, operators)
    from gnomon.arch.transformers_network import TransformersNetwork

    return TransformersNetwork(checkpoint, operators)
