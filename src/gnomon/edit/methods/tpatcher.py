"""T-Patcher: one neuron per wrong token in the last MLP (Transformer-Patcher, arXiv 2301.09785).

A neuron adds relu(k x + b) v to the MLP's output. k begins at q / |q|^2, which answers 1 to the query q where the wrong
token was predicted. Besides -log p of the target two losses train it: the activation loss (answer to the own query) and
the memory loss (be silent on queries that are not one's own, by an amount and by a margin). The paper's memory is
40,000 queries of training data; here it is ordinary sentences and the same sentence about other subjects.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contexts import PREFIXES, Context, Contexts
from gnomon.edit.contrast import other_facts
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, edit_method
from gnomon.edit.training import Trained, TrainingOptions, positions, train
from gnomon.kernels.wrappers import make_wrapper
from gnomon.models.patch import Wrapper

OTHERS = 12
"""Other subjects whose sentences are the memory, beside ordinary ones."""
WORST = 8
"""So many queries of the memory, a neuron's loudest ones, are silenced."""


class TPatcherOptions(TrainingOptions):
    """T-Patcher's options."""

    rate: Annotated[float, Field(gt=0, description="Learning rate (Adam).")] = 0.02
    activate: Annotated[float, Field(ge=0, description="Weight of answering to its own query (the paper's a).")] = 1.0
    silence: Annotated[float, Field(ge=0, description="Weight of keeping silent elsewhere (the paper's m).")] = 5.0
    bound: Annotated[float, Field(description="Answers elsewhere lie below this (beta).")] = -0.3
    margin: Annotated[float, Field(ge=0, description="And below its own answers by this (gamma).")] = 1.0


@edit_method("t-patcher", TPatcherOptions, paper="2301.09785", on="activations")
def t_patcher(editor: Editor, facts: Sequence[Fact], options: TPatcherOptions) -> Change:
    """Neurons in the last MLP, one per wrong token, silent on everything else."""
    layer = editor.layer(options.layers if options.layers is not None else [-1], "t-patcher")
    maker = editor.contexts(options.prefixes, chat=options.chat, frames=options.frames)
    parts, notes = [], []
    for fact in facts:
        tensors, found = _neurons(editor, layer, maker.of(fact), _memory(editor, layer, maker, fact), options)
        parts.append(tensors)
        notes.append({**found.note(layer), "neurons": len(tensors["bias"])})
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Change({}, notes, wrappers=[Wrapper("neurons", layer, joined)])


def _neurons(
    editor: Editor, layer: int, contexts: Sequence[Context], memory_NC: Tensor, options: TPatcherOptions
) -> tuple[dict[str, Tensor], Trained]:
    """One fact's neurons: key, bias and value."""
    rows = Rows.align([c.inputs for c in contexts], [0] * len(contexts))
    row, token = (torch.tensor(axis) for axis in zip(*positions(contexts), strict=True))
    query_nC = editor.passes.mlp_inputs(rows, [layer])[layer][row, token].float()
    square_n1 = query_nC.pow(2).sum(1, keepdim=True)
    unit = float(square_n1.mean().rsqrt())  # keys are as small as this: they are learned in this unit
    key_nC = (query_nC / square_n1 / unit).clone().requires_grad_(True)
    bias_n = torch.zeros(len(key_nC), requires_grad=True)
    value_nC = torch.zeros_like(query_nC).requires_grad_(True)

    def tensors() -> dict[str, Tensor]:
        return {"key": key_nC * unit, "bias": bias_n, "value": value_nC}

    def silence() -> Tensor:
        """Answer to the own query; elsewhere lie below a bound, and below the own answer by a margin."""
        own_n = unit * (query_nC * key_nC).sum(1) + bias_n
        elsewhere_Nn = unit * memory_NC @ key_nC.T + bias_n
        worst_n = elsewhere_Nn.topk(min(WORST, len(memory_NC)), dim=0).values.mean(0)
        quiet = torch.relu(worst_n - options.bound).mean() + torch.relu(worst_n - own_n + options.margin).mean()
        return options.activate * (-own_n).exp().mean() + options.silence * quiet

    learned = [key_nC, bias_n, value_nC]
    found = train(editor, layer, contexts, lambda: make_wrapper("neurons", tensors()), learned, options, extra=silence)
    return {name: tensor.detach() for name, tensor in tensors().items()}, found


def _memory(editor: Editor, layer: int, maker: Contexts, fact: Fact) -> Tensor:
    """What enters the MLP in ordinary sentences and in those about other subjects -> [N, C]."""
    sentences = [editor.model.encode(text) for text in PREFIXES]
    sentences += [list(context.inputs) for other in other_facts(fact, OTHERS) for context in maker.of(other)]
    rows = Rows.align(sentences, [0] * len(sentences))
    return editor.passes.mlp_inputs(rows, [layer])[layer][rows.mask_BT.bool()].float()
