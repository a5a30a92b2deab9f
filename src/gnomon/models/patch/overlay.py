"""A checkpoint seen through a patch: W + delta, computed when a tensor is asked for.

Nothing is written, so taking the patch off again is exact. GGUF blocks under a delta are dequantised to float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from gnomon.errors import PatchError, WrongBase
from gnomon.models import identity
from gnomon.models.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.kernels.operators import QuantizedTensor
    from gnomon.models.patch.patch import Patch
    from gnomon.models.tokenizer import Tokenizer


def derived_identity(patch: Patch, base: str) -> str:
    """What a checkpoint of this identity becomes under a patch."""
    return identity.derived("patch", {"patch": patch.identity}, [base])


class PatchedCheckpoint(Checkpoint):
    """One patch over one checkpoint, itself possibly patched."""

    def __init__(self, base: Checkpoint, patch: Patch, *, any_base: bool = False) -> None:
        check_fits(patch, base, any_base=any_base)
        self.base = base
        self.patch = patch
        self.any_base = any_base
        self.path = None  # no file holds these tensors: who reads files must not take the unpatched ones
        self.reference = f"{base.reference}+{patch.identity[:12]}"
        self.name = f"{base.name}+{patch.identity[:12]}"
        self.config = base.config
        self.generation_config = base.generation_config
        self.chat_template = base.chat_template

    def info(self, name: str) -> TensorInfo:
        info = self.base.info(name)
        quantised = name in self.patch.deltas and self.base.quantized(name) is not None
        return TensorInfo(name, info.shape, "float32") if quantised else info

    def __getitem__(self, name: str) -> Tensor:
        weight = self.base[name]
        if name not in self.patch.deltas:
            return weight
        return (weight.float() + self.patch.deltas[name].full()).to(weight.dtype)

    def reader(self, name: str) -> Callable[[int, int], Tensor]:
        return super().reader(name) if name in self.patch.deltas else self.base.reader(name)

    @property
    def has_blocks(self) -> bool:
        return self.base.has_blocks

    def quantized(self, name: str) -> QuantizedTensor | None:
        return None if name in self.patch.deltas else self.base.quantized(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.base)

    def __len__(self) -> int:
        return len(self.base)

    @property
    def identity(self) -> str:
        return derived_identity(self.patch, self.base.identity)

    def tokenizer(self) -> Tokenizer:
        return self.base.tokenizer()

    def close(self) -> None:
        self.base.close()


def lineage(checkpoint: Checkpoint) -> list[str]:
    """The identities a checkpoint has had, the unpatched one first: a patch for any of them may lie on top."""
    below = lineage(checkpoint.base) if isinstance(checkpoint, PatchedCheckpoint) else []
    return [*below, checkpoint.identity]


def check_fits(patch: Patch, checkpoint: Checkpoint, *, any_base: bool = False) -> None:
    """Raises WrongBase for a patch of another model, PatchError for a tensor that is missing or shaped otherwise."""
    if not any_base and patch.base not in (known := lineage(checkpoint)):
        raise WrongBase(
            f"The patch was made for the model {patch.base[:16]}; {checkpoint.reference} is {known[-1][:16]}.",
            hint="Make it again for this model, or insist (any_base=True, --any-base) when the tensors mean the same.",
        )
    for name, delta in patch.deltas.items():
        if name not in checkpoint:
            tied = name == "lm_head.weight" and checkpoint.config.get("tie_word_embeddings")
            raise PatchError(
                f"{checkpoint.reference} has no tensor `{name}` that the patch changes.",
                hint="Its head is tied: change `model.embed_tokens.weight`." if tied else None,
            )
        shape = tuple(checkpoint.info(name).shape)
        if shape != delta.shape:
            raise PatchError(
                f"The patch's delta of `{name}` is {delta.shape}, the weight of {checkpoint.reference} {shape}."
            )


def without(checkpoint: Checkpoint, patch: Patch) -> Checkpoint:
    """The checkpoint with its uppermost layer of this patch taken out."""
    if not isinstance(checkpoint, PatchedCheckpoint):
        raise PatchError(f"{checkpoint.reference} does not wear the patch {patch.identity[:12]}.")
    if checkpoint.patch == patch:
        return checkpoint.base
    return PatchedCheckpoint(without(checkpoint.base, patch), checkpoint.patch, any_base=checkpoint.any_base)
