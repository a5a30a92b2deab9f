"""Knowledge neurons: find the MLP channels that carry a fact, and rewrite what they write (arXiv 2104.08696).

The attribution of a channel is the integrated gradient of the answer's probability along its activation, from zero to
what it is, at the prompt's last token (eq. 2, by Riemann sums). The channels with the largest attribution are the
fact's neurons; each one's column of the down projection loses `lambda_old` times the old answer's embedding and gains
`lambda_new` times the new one's. The paper refines neurons over several prompts; here the attributions of all contexts
are averaged, and embeddings are scaled to the length of the column they join, so that the lambdas need no unit. It
measures how much of a fact lies in single channels, and edits badly: SmolLM2-135M repeated the target without end at
every strength that was tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from gnomon.edit.contexts import Context
from gnomon.edit.editor import Editor
from gnomon.edit.facts import Fact, continued
from gnomon.edit.passes import Rows
from gnomon.edit.registry import Change, MethodOptions, edit_method
from gnomon.models.patch import LowRank


class NeuronOptions(MethodOptions):
    """Options of knowledge neurons."""

    neurons: Annotated[int, Field(gt=0, le=512, description="How many neurons are rewritten.")] = 20
    parts: Annotated[int, Field(gt=0, le=64, description="Steps of the integral.")] = 10
    lambda_old: Annotated[float, Field(ge=0, description="Of the old answer's embedding, taken away.")] = 1.0
    lambda_new: Annotated[float, Field(ge=0, description="Of the new answer's embedding, put in.")] = 1.0
    prefixes: Annotated[int, Field(ge=0, le=16, description="Prefixes put before the prompt.")] = 3
    chat: Annotated[bool, Field(description="See the fact through the chat template as well.")] = False


@edit_method("neurons", NeuronOptions, paper="2104.08696", experimental=True)
def neurons(editor: Editor, facts: Sequence[Fact], options: NeuronOptions) -> Change:
    """Rewrite what the channels write whose integrated gradients carry the old answer."""
    layers = editor.anatomy.check_layers(options.layers or list(range(len(editor.anatomy.layers))))
    columns: dict[int, list[tuple[int, Tensor]]] = {}
    notes: list[dict[str, Any]] = []
    head: Tensor = editor.anatomy.module.get_output_embeddings().weight.detach().float()
    maker = editor.contexts(options.prefixes, chat=options.chat)
    for fact in facts:
        contexts = maker.of(fact)
        new, old = contexts[0].target_ids[0], _old(editor, fact, contexts[0])
        values_LM, keys_LM = attributions(editor, layers, contexts, old, options.parts)
        best = values_LM.flatten().topk(options.neurons)
        for place in best.indices.tolist():
            row, channel = divmod(place, values_LM.shape[1])
            column = editor.anatomy.downs[layers[row]].weight_CM[:, channel].float()
            # A gated channel may be negative where the fact is asked: what it writes is turned round then.
            size = float(column.norm()) * (1.0 if float(keys_LM[row, channel]) >= 0 else -1.0)
            change = options.lambda_new * _unit(head[new]) - options.lambda_old * _unit(head[old])
            columns.setdefault(layers[row], []).append((channel, size * change))
        found = [[layers[p // values_LM.shape[1]], p % values_LM.shape[1]] for p in best.indices.tolist()]
        share = float(best.values.sum() / values_LM.clamp(min=0).sum())
        notes.append({"neurons": found, "share_of_attribution": round(share, 4)})
    return Change({editor.tensor(layer): _delta(editor, layer, own) for layer, own in columns.items()}, notes)


def attributions(
    editor: Editor, layers: Sequence[int], contexts: Sequence[Context], token: int, parts: int
) -> tuple[Tensor, Tensor]:
    """Integrated gradients of p(token) by every channel at the prompts' last token, and the activations -> [L, M] each.

    v_i * 1/m * sum over k of dP(k/m v)/dv_i, averaged over the contexts.
    """
    shares = (torch.arange(parts) + 0.5) / parts
    found, activations = [], []
    for layer in layers:
        weight_CM = editor.anatomy.downs[layer].weight_CM.float()
        total = torch.zeros(weight_CM.shape[1])
        for context in contexts:
            last = context.target[0] - 1
            rows = Rows.align([context.ids[: last + 1]] * parts, [last] * parts)
            captured = editor.passes.capture(rows, layer)
            key_BM = captured.key_BM.float()
            scaled_BM = (shares[:, None] * key_BM).requires_grad_(True)
            moved_BC = (scaled_BM - key_BM) @ weight_CM.T
            hidden = editor.passes.above(captured, lambda out, moved=moved_BC: out + moved.to(out.dtype))  # type: ignore[misc]
            chance = torch.softmax(editor.anatomy.logits(hidden[:, 0]), -1)[:, token].sum()
            (gradient,) = torch.autograd.grad(chance, scaled_BM)
            total += key_BM[0] * gradient.mean(0)
        found.append(total / len(contexts))
        activations.append(key_BM[0])
    return torch.stack(found), torch.stack(activations)


def _old(editor: Editor, fact: Fact, context: Context) -> int:
    """The first token of the old answer: the fact's own, else what the model says now."""
    if fact.old is not None:
        ids: list[int] = editor.model.tokenizer.encode(continued(fact.prompt, fact.old), add_special_tokens=False)
        return ids[0]
    return int(editor.model.logits(list(context.ids[: context.target[0]]))[-1].argmax())


def _delta(editor: Editor, layer: int, columns: Sequence[tuple[int, Tensor]]) -> LowRank:
    down_nM = torch.zeros(len(columns), editor.anatomy.inner)
    down_nM[torch.arange(len(columns)), torch.tensor([channel for channel, _ in columns])] = 1.0
    return editor.low_rank(layer, (torch.stack([change for _, change in columns], 1), down_nM))


def _unit(vector: Tensor) -> Tensor:
    scaled: Tensor = vector / vector.norm()
    return scaled
