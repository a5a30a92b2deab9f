"""RegMean++ (arXiv 2508.03121): RegMean on the states that the merged layers below give. Needs `data:`."""

from __future__ import annotations

import torch
from torch import Tensor

from gnomon.merge.blocks import Block, TensorView
from gnomon.merge.methods.regmean import check
from gnomon.merge.registry import PerModel, each, merge_method
from gnomon.merge.spectral import rows_of, weighted_sum


def measure(view: TensorView, *, weight: list[float], alpha: float) -> Tensor | None:
    """The merged weight [O, I]; None for what is averaged."""
    if view.once is None or view.texts is None:
        return None

    def make() -> dict[str, Tensor]:
        from gnomon.merge.regmean_pp import merged_layers

        models, texts = view.texts() if view.texts is not None else ([], [])
        with torch.no_grad():
            return merged_layers(models, texts, weight, alpha)

    found: dict[str, Tensor] = view.once(f"regmean_pp {weight} {alpha}", make)
    return found.get(view.name)


@merge_method(
    "regmean_pp",
    base="ignored",
    measure=measure,
    check=check,
    whole=True,
    statistics="texts",
    reference="arXiv 2508.03121",
)
def regmean_pp(
    block: Block, measured: Tensor | None, *, weight: PerModel[float] = each(1.0), alpha: float = 0.9
) -> Tensor:
    """RegMean layer by layer, each on what the merged layers below give; the rest is averaged."""
    if measured is None:
        return weighted_sum(block.models_RC, [share / sum(weight) for share in weight])
    return rows_of(measured, block)
