"""The model as it is under a change (a patch, or a memory beside it), for reports and evaluation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gnomon.edit.memory import Memory
from gnomon.errors import UnsupportedModel, UsageError
from gnomon.models.patch import Patch

if TYPE_CHECKING:
    from gnomon.model import Model


Change = Patch | Memory
"""What an edit comes to: a change of weights, or something that is remembered."""


@contextmanager
def wearing(model: Model, patch: Change | None) -> Iterator[Model]:
    """The model with the patch: beside its weights where it is low-rank, else in them until the block ends.

    A memory is put before every question.
    """
    if patch is None:
        yield model
        return
    if isinstance(patch, Memory):
        with model.with_patches([]) as reminded:
            reminded.defaults = {**model.defaults, "remember": patch.as_options()}
            yield reminded
        return
    if patch.is_low_rank:
        with model.with_patches([patch]) as edited:
            yield edited
        return
    if model.worn:
        raise UsageError(
            "A dense or sparse edit cannot be tried on a model that wears patches.",
            hint="Give the method a `rank`, or load the patched weights.",
        )
    network = model.network
    if network is None:
        raise UnsupportedModel(f"`{model.name}` has no generating network.")
    live = network.tensors()
    kept = {name: live[name].clone() for name in patch.deltas}
    with model.worker.paused():
        for name in patch.deltas:
            live[name].add_(patch.dense(name))
        network.refresh()
        model.worker.weights_changed(f"{model.fingerprint}+{patch.identity[:12]}")
    try:
        yield model
    finally:
        with model.worker.paused():
            for name, tensor in kept.items():
                live[name].copy_(tensor)
            network.refresh()
            model.worker.weights_changed(model.fingerprint)


def texts(model: Model, prompts: Sequence[Any], tokens: int) -> list[str]:
    """Greedy continuations of all prompts in one batch; a list of messages is answered as a chat."""
    options = {"temperature": 0.0, "max_tokens": tokens}
    handles = [model.submit(prompt, options, chat=not isinstance(prompt, str)) for prompt in prompts]
    return [handle.collect()[0].text for handle in handles]
