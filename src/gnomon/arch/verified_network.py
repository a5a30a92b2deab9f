"""Verified mode: a decoder of transformers' whose bits do not depend on the batch, without canonical kernels.

The verifying half of LLM-42's decode, verify, roll back (arXiv 2601.17768). Stock kernels give a row the same bits as
long as the shape is the same. So there is one: WINDOW rows at positions [j WINDOW, (j + 1) WINDOW) of one text,
after exactly j WINDOW cached ones, padded where tokens are not known yet. A row's bits follow from its text and place.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from gnomon.arch.network import NONE
from gnomon.arch.transformers_network import TransformersNetwork, cut
from gnomon.errors import UnsupportedModel
from gnomon.kernels.batch import Span
from gnomon.kernels.operators import Operators
from gnomon.kernels.side import SidePath, SideRows
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.wrapper import Wrapper

WINDOW, HEAD_ROWS = 32, 4
"""Rows of every verifying pass, and of every product with the head: part of the numbers."""


class VerifiedNetwork(TransformersNetwork):
    """Implements `Network`."""

    accepts_drafts = True
    """Rows past the known ones are computed in the same window: checking guesses costs nothing more."""

    def __init__(self, checkpoint: Checkpoint, operators: Operators) -> None:
        super().__init__(checkpoint, operators)
        self._texts: dict[int, list[int]] = {}

    def apart(self) -> VerifiedNetwork:
        """The same weights with caches of their own: for a certificate beside running requests."""
        other = copy.copy(self)
        other._caches, other._texts = {}, {}
        return other

    def description(self) -> dict[str, object]:
        """What can change a bit: stock torch on this kind of processor, and the one shape."""
        return {
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
            "window": WINDOW,
            "head_rows": HEAD_ROWS,
        }

    def _run(self, span: Span) -> Tensor:
        text = self._texts.setdefault(span.sequence, [])
        del text[span.start :]
        text += span.token_ids
        first, last = span.start // WINDOW, (span.end - 1) // WINDOW
        rows = torch.cat([self._window(span.sequence, text, j) for j in range(first, last + 1)])
        return rows[span.start - first * WINDOW : span.end - first * WINDOW]

    def _window(self, sequence: int, text: list[int], index: int) -> Tensor:
        """One pass in the one shape -> [WINDOW, C]. Its keys stay only if all its tokens are known."""
        from transformers import DynamicCache

        start = index * WINDOW
        cache = self._caches.get(sequence)
        if cache is None or cache.get_seq_length() < start:
            cache = self._caches[sequence] = DynamicCache(config=self.model.config)
            for before in range(index):
                self._window(sequence, text, before)
        cut(cache, start)
        known = text[start : start + WINDOW]
        ids = torch.tensor([known + [0] * (WINDOW - len(known))])
        places = torch.arange(start, start + WINDOW)[None]
        out = self.model.base_model(input_ids=ids, position_ids=places, past_key_values=cache, use_cache=True)
        if len(known) < WINDOW:
            cut(cache, start)
        hidden: Tensor = out.last_hidden_state[0].float()
        return hidden

    @torch.inference_mode()
    def logits(self, hidden_RC: Tensor, sides: Sequence[SideRows] = ()) -> Tensor:
        """-> [R, V]: a product for every row, which is the first of HEAD_ROWS."""
        pieces = []
        for row in hidden_RC:
            padded = torch.zeros(HEAD_ROWS, hidden_RC.shape[1])
            padded[0] = row
            pieces.append(super().logits(padded)[:1])
        return torch.cat(pieces)

    def side_path(
        self, factors: Mapping[str, tuple[Tensor, Tensor]], wrappers: Mapping[str, Wrapper] = NONE
    ) -> SidePath:
        raise UnsupportedModel(
            "Patches do not run beside the weights in verified mode.", hint="Load the patched weights (Patch.apply)."
        )

    def release(self, sequence: int) -> None:
        super().release(sequence)
        self._texts.pop(sequence, None)
