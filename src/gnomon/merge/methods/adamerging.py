"""AdaMerging, layer-wise (arXiv 2310.02575): task arithmetic whose weights make the entropy on `data` least."""

from __future__ import annotations

from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.deltas import Trim, combine
from gnomon.merge.registry import merge_method


@merge_method("adamerging", learned="adamerging", reference="arXiv 2310.02575")
def adamerging(block: Block, measured: None) -> Tensor:
    """Base plus task vectors, one learned weight per model and layer; labels are not needed."""
    trims = [Trim()] * len(block.raw)
    return combine(block, trims, weight=block.view.learned, normalize=False, scale=1.0, elect=False)
