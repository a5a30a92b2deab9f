"""A model that says a given text: a capability whose mask leaves one token, for tests of what stands behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from gnomon.capability import Capability
from gnomon.model import Model
from gnomon.registry import Registry
from gnomon.stages import StageContext


class SayOptions(BaseModel):
    text: str


class Say:
    """Token by token the text, then the end."""

    def __init__(self, ids: list[int], end: int) -> None:
        self.ids = [*ids, end]

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        token = self.ids[min(len(generated), len(self.ids) - 1)]
        kept = logits_V[token].item()
        logits_V[:] = -torch.inf
        logits_V[token] = kept
        return logits_V

    def accept(self, token_id: int) -> None: ...

    def rollback(self, count: int) -> None: ...

    def copy(self) -> Say:
        return self


def build(options: SayOptions, context: StageContext) -> Say:
    ids = context.tokenizer.encode(options.text, add_special_tokens=False)
    return Say(ids, min(context.tokenizer.eos_token_ids))


SAY = Capability("say", "For tests.", options=SayOptions, phase="mask", logits_stage=f"{__name__}:build")


@contextmanager
def saying(model: Model, **defaults: Any) -> Iterator[Model]:
    """The model with the capability `say` and these operator's defaults."""
    registry, before = model.registry, model.defaults
    model.registry = Registry([*registry.capabilities.values(), SAY])
    model.defaults = {**before, **defaults}
    try:
        yield model
    finally:
        model.registry, model.defaults = registry, before
