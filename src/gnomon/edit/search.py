"""From a fact to its key and its value at one layer: what the locate-and-edit methods have in common."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.registry import SearchOptions
from gnomon.edit.values import Value, ValueOptions, capture, optimise


@dataclass(frozen=True)
class Found:
    """keys_BM: the key in every context, the bare prompt's first. value: what the search found."""

    keys_BM: Tensor
    value: Value


def find_value(
    editor: Editor, fact: Fact, layer: int, options: SearchOptions, *, at_layer: bool = False, early: bool = False
) -> Found:
    """Key and value of one fact. at_layer: the value is the layer's output, not its MLP's. early: stop when said."""
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    contexts = maker.of(fact)
    essence = maker.essence(fact) if options.kl else None
    captured = capture(editor.passes, layer, contexts, essence)
    search = ValueOptions(
        steps=options.steps,
        rate=options.rate,
        relative=options.relative,
        clamp=options.clamp,
        kl=options.kl,
        decay=options.decay,
        stop=options.stop,
        most_probable=early,
    )
    value = optimise(editor.passes, captured, contexts, search, essence=essence is not None, at_layer=at_layer)
    return Found(captured.key_BM[: len(contexts)], value)
