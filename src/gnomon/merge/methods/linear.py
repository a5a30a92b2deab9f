"""Weighted average of the models themselves (model soups, arXiv 2203.05482)."""

from __future__ import annotations

from torch import Tensor

from gnomon.errors import UsageError
from gnomon.merge.blocks import Block
from gnomon.merge.registry import PerModel, merge_method


def check_weights(weight: list[float], normalize: bool) -> None:
    if normalize and sum(weight) == 0:
        raise UsageError(
            "The weights of `linear` sum to 0.", hint="Set normalize: false, or other weights.", param="weight"
        )


@merge_method("linear", base="ignored", check=check_weights, reference="arXiv 2203.05482")
def linear(block: Block, measured: None, *, weight: PerModel[float], normalize: bool = True) -> Tensor:
    """Weighted average of the models; no base model."""
    merged_RC = block.models_RC[0] * weight[0]
    for model_RC, share in zip(block.models_RC[1:], weight[1:], strict=True):
        merged_RC.add_(model_RC, alpha=share)
    return merged_RC.div_(sum(weight)) if normalize else merged_RC
