"""Merge weights that are found on texts: greedy soup (arXiv 2203.05482) and AdaMerging (arXiv 2310.02575).

Both end in weights, per model or per model and layer; the merge itself is an average or task arithmetic as ever, so
what was learned can be read off. Knows checkpoints and texts, nothing of blocks or files.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING

import torch

from gnomon.errors import UsageError
from gnomon.loading import load
from gnomon.merge.layout import Layout
from gnomon.merge.perplexity import text_loss
from gnomon.models.checkpoint import Checkpoint
from gnomon.progress import progress

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.merge.data import Data

log = logging.getLogger(__name__)
WINDOW = 256
START, STEPS, RATE, BATCH = 0.3, 40, 0.02, 4
"""AdaMerging: the paper's first weight; Adam steps, their rate, windows of one step."""


def greedy_soup(models: Sequence[Checkpoint], base: Checkpoint | None, texts: Sequence[Data]) -> dict[str, list[float]]:
    """Weights by tensor: 1 for the models in the soup, 0 for the others.

    From the best model on, each joins the average if the mean loss over the texts does not rise.
    """
    alone = [_loss([model], texts) for model in models]
    order = sorted(range(len(models)), key=lambda place: (alone[place], place))
    chosen, best = [order[0]], alone[order[0]]
    for place in order[1:]:
        loss = _loss([models[i] for i in (*chosen, place)], texts)
        log.info("greedy soup: with %s the loss is %.4f (it was %.4f)", models[place].name, loss, best)
        if loss <= best:
            chosen, best = [*chosen, place], loss
    weights = [1.0 if place in chosen else 0.0 for place in range(len(models))]
    return dict.fromkeys(models[0], weights)


def _loss(models: Sequence[Checkpoint], texts: Sequence[Data]) -> float:
    """Mean loss over the texts of the models' average."""
    from gnomon.merge.build import open_merge

    named = {f"m{place}": model for place, model in enumerate(models)}
    entries = [{"model": name, "parameters": {"weight": 1.0}} for name in named]
    merged = models[0] if len(models) == 1 else open_merge({"merge_method": "linear", "models": entries}, models=named)
    with load(merged, max_sequences=1, ledger=False) as model:
        return math.fsum(text_loss(model, text.text, most_tokens=text.tokens).mean for text in texts) / len(texts)


def adamerging(models: Sequence[Checkpoint], base: Checkpoint | None, texts: Sequence[Data]) -> dict[str, list[float]]:
    """Weights by tensor: one per model and layer, that make the merged model's next-token entropy least on the texts.

    No labels are read. Gradients of a weight are inner products of the parameters' gradients with a task vector, which
    is read from its file when it is needed.
    """
    if base is None:
        raise UsageError("adamerging needs a base model.", hint="Set `base_model`.", param="base_model")
    layout = Layout.of(base)
    places = {name: (place.stack, place.layer) for name, place in layout.places.items()}
    groups = list(dict.fromkeys(places.values()))
    weights = torch.full((len(groups), len(models)), START, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=RATE)
    with load(base, max_sequences=1, ledger=False) as running:
        own = [_windows(running.encode(text.text)[: text.tokens]) for text in texts]
        # by turns: a step that saw one text alone would have its weights grow at the others' expense
        windows = [window for row in zip_longest(*own) for window in row if window is not None]
        with running.module() as shared:
            module = copy.deepcopy(shared)  # the running model's weights stay what they are
    parameters = {name: p.requires_grad_(True) for name, p in module.named_parameters() if name in places}
    with progress("learning weights", total=STEPS) as bar:
        for step in range(STEPS):
            chosen = [windows[(step * BATCH + place) % len(windows)] for place in range(min(BATCH, len(windows)))]
            _place(parameters, models, base, weights.detach(), groups, places)
            entropy = _entropy(module, chosen)
            weights.grad = torch.zeros_like(weights)
            for name, parameter in parameters.items():
                if parameter.grad is not None:
                    row, own_base = groups.index(places[name]), base[name].float()
                    for column, model in enumerate(models):
                        weights.grad[row, column] += (parameter.grad * (model[name].float() - own_base)).sum()
                    parameter.grad = None
            optimizer.step()
            log.info("adamerging: step %d of %d, entropy %.4f", step + 1, STEPS, entropy)
            bar.advance()
    found = weights.detach().tolist()
    return {name: found[groups.index(place)] for name, place in places.items()}


def _windows(ids: list[int]) -> list[list[int]]:
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UsageError("The text of `data` is too short: it has fewer than two tokens.", param="data")
    return windows


def _place(
    parameters: Mapping[str, Tensor],
    models: Sequence[Checkpoint],
    base: Checkpoint,
    weights: Tensor,
    groups: Sequence[tuple[str, int]],
    places: Mapping[str, tuple[str, int]],
) -> None:
    """Write base + the weighted task vectors into a module's parameters."""
    with torch.no_grad():
        for name, parameter in parameters.items():
            own_base = base[name].float()
            parameter.copy_(own_base)
            for model, weight in zip(models, weights[groups.index(places[name])], strict=True):
                parameter.add_((model[name].float() - own_base) * weight)


def _entropy(module: torch.nn.Module, windows: Sequence[list[int]]) -> float:
    """Mean next-token entropy (nats) of some windows, with gradients in the module's parameters."""
    total = 0.0
    for window in windows:
        with torch.enable_grad():
            logits_TV = module(input_ids=torch.tensor([window])).logits[0].float()
            logs_TV = logits_TV.log_softmax(-1)
            entropy = -(logs_TV.exp() * logs_TV).sum(-1).mean() / len(windows)
            entropy.backward()
        total += float(entropy.detach())
    return total


LEARNED = {"greedy_soup": greedy_soup, "adamerging": adamerging}
