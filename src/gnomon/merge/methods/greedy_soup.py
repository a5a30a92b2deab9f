"""Greedy soup (arXiv 2203.05482): average those models that together predict the texts of `data` best."""

from __future__ import annotations

from torch import Tensor

from gnomon.merge.blocks import Block
from gnomon.merge.registry import merge_method
from gnomon.merge.spectral import weighted_sum


@merge_method("greedy_soup", base="ignored", learned="greedy_soup", reference="arXiv 2203.05482")
def greedy_soup(block: Block, measured: None) -> Tensor:
    """The average of the models that a greedy search on `data` takes in."""
    chosen = block.view.learned
    return weighted_sum(block.models_RC, [weight / sum(chosen) for weight in chosen])
