"""Any decoder that transformers knows, behind the same Network interface.

Slower than ours, and its bits are not certified to be the same in every batch, which it says. Each sequence has a
cache of its own instead of pages.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from gnomon.arch.module_side import module_side_path, running_beside
from gnomon.arch.network import NONE, Pages
from gnomon.errors import MissingExtra, PatchError, UnsupportedModel, UsageError
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.operators import Operators
from gnomon.kernels.side import SidePath, SideRows
from gnomon.models.checkpoint import Checkpoint
from gnomon.models.patch.wrapper import Wrapper

log = logging.getLogger("gnomon.arch")


class TransformersNetwork:
    """Implements `Network` over transformers' own forward pass."""

    shares_pages = False

    def __init__(self, checkpoint: Checkpoint, operators: Operators) -> None:
        self.architecture: str = (checkpoint.config.get("architectures") or ["(none)"])[0]
        if operators.dtype not in ("fp32", "bf16"):
            raise UsageError(f"`{self.architecture}` runs through transformers, in fp32 or bf16 only.", param="profile")
        self.model = _load(checkpoint, self.architecture, operators.dtype)
        config = self.model.config
        self.vocab_size: int = config.vocab_size
        self.hidden_size: int = config.hidden_size
        self.max_context: int = getattr(config, "max_position_embeddings", None) or 2048
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.page_bytes = 2 * 4 * config.num_hidden_layers * heads * size * PAGE
        self._caches: dict[int, Any] = {}
        self._check_head()
        log.warning(
            "%s is not one of gnomon's own networks: it runs through transformers, slower, and its bits may change "
            "with the batch.",
            self.architecture,
        )

    def new_pages(self, count: int) -> Pages:
        return []

    @torch.inference_mode()
    def forward(self, batch: RaggedBatch, pages: Pages) -> Tensor:
        return torch.cat([self._run(span) for span in batch.spans])

    def _run(self, span: Span) -> Tensor:
        """One sequence's new tokens -> [T, C]; a sequence that starts over, or was rolled back, is cut to its start."""
        from transformers import DynamicCache

        if span.start == 0 or span.sequence not in self._caches:
            self._caches[span.sequence] = DynamicCache(config=self.model.config)
        cache = self._caches[span.sequence]
        cut(cache, span.start)
        ids = torch.tensor([span.token_ids])
        with running_beside(self.model, span.sides):
            out = self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        hidden: Tensor = out.last_hidden_state[0].float()
        return hidden

    @torch.inference_mode()
    def logits(self, hidden_RC: Tensor, sides: Sequence[SideRows] = ()) -> Tensor:
        head = self.model.get_output_embeddings()
        logits: Tensor = head(hidden_RC.to(head.weight.dtype)).float()
        for group in sides:
            rows = slice(group.begin, group.end)
            with running_beside(self.model, group.paths):
                logits[rows] = head(hidden_RC[rows].to(head.weight.dtype)).float()
        return logits

    def side_path(
        self, factors: Mapping[str, tuple[Tensor, Tensor]], wrappers: Mapping[str, Wrapper] = NONE
    ) -> SidePath:
        if wrappers:
            raise PatchError(
                f"`{self.architecture}` runs through transformers: nothing acts on its activations "
                f"({next(iter(wrappers))}).",
                hint="Such patches run on gnomon's own networks: Llama, Mistral, Qwen, Gemma and their like.",
            )
        return module_side_path(self.model, factors)

    def tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters())

    def refresh(self) -> None:
        """Nothing is derived from the weights."""

    def release(self, sequence: int) -> None:
        """Forget a sequence's cache."""
        self._caches.pop(sequence, None)

    def _check_head(self) -> None:
        """Hidden states through the head must be the model's own logits; scalings in between are refused."""
        ids = torch.arange(4)[None] % self.vocab_size
        with torch.inference_mode():
            whole = self.model(input_ids=ids, use_cache=False).logits[0].float()
            parts = self.logits(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
        if not torch.allclose(whole, parts, rtol=1e-3, atol=1e-4):
            raise UnsupportedModel(f"`{self.architecture}` changes its logits after the head; that is not supported.")


def _load(checkpoint: Checkpoint, architecture: str, dtype: str) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra(
            f"`{architecture}` is not one of gnomon's own networks; running it", "transformers"
        ) from None
    if checkpoint.path is None or not checkpoint.path.is_dir():
        raise UnsupportedModel(f"`{architecture}` is not supported from {checkpoint.reference}.")
    kind = getattr(transformers, architecture, None)
    if kind is None or not architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise UnsupportedModel(f"`{architecture}` is no decoder that transformers {transformers.__version__} knows.")
    try:
        model = kind.from_pretrained(
            checkpoint.path, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except (ValueError, OSError, RuntimeError) as error:
        raise UnsupportedModel(
            f"transformers cannot load {checkpoint.reference}: {str(error).splitlines()[0]}"
        ) from None
    return model.eval()


def cut(cache: Any, length: int) -> None:
    """Forget what lies past this length."""
    if (surplus := cache.get_seq_length() - length) > 0:
        cache.crop(-surplus)
