"""Where each expert's prompts are, layer by layer: the rows of a mixture's router.

Legend: L layers, N experts, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gnomon.merge.moe.options import Expert
from gnomon.models.checkpoint import Checkpoint
from gnomon.progress import progress

DEGENERATE = 5.0
"""Condition number of a layer's router beyond which experts are hardly told apart."""


def router(base: Checkpoint, experts: Sequence[Expert], mode: str, seed: int) -> Tensor:
    """[L, N, H] float32: where each expert's prompts are, at the input of each layer."""
    layers, hidden = int(base.config["num_hidden_layers"]), int(base.config["hidden_size"])
    shape = (layers, len(experts), hidden)
    generator = torch.Generator().manual_seed(seed)
    if mode == "random":
        return torch.randn(shape, generator=generator)
    if mode == "uniform_random":  # as torch makes a new linear layer
        return torch.rand(shape, generator=generator).mul(2).sub(1).mul(hidden**-0.5)
    prompts = [text for expert in experts for text in (*expert.positive_prompts, *expert.negative_prompts)]
    found = _embedded(base, prompts) if mode == "cheap_embed" else _hidden(base, mode, prompts)
    rows = []
    for expert in experts:
        row_LH = _middle(found, expert.positive_prompts)
        if expert.negative_prompts and mode == "cheap_embed":
            row_LH = _unit(row_LH) - _unit(_middle(found, expert.negative_prompts))
        elif expert.negative_prompts:
            row_LH = row_LH - _middle(found, expert.negative_prompts)
        rows.append(_unit(row_LH).expand(layers, hidden))
    return torch.stack(rows, dim=1)


def _middle(found: dict[str, Tensor], prompts: Sequence[str]) -> Tensor:
    return torch.stack([found[prompt] for prompt in prompts]).mean(0)


def _unit(row_LH: Tensor) -> Tensor:
    unit: Tensor = row_LH / row_LH.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return unit


def _token_ids(base: Checkpoint, prompt: str) -> list[int]:
    tokenizer = base.tokenizer()
    ids: list[int] = tokenizer.backend.encode(prompt, add_special_tokens=False).ids
    return ids if tokenizer.bos_token_id is None else [tokenizer.bos_token_id, *ids]


def _embedded(base: Checkpoint, prompts: Sequence[str]) -> dict[str, Tensor]:
    """By prompt, [1, H]: the sum of its tokens' embeddings."""
    table = base["model.embed_tokens.weight"]
    return {prompt: table[_token_ids(base, prompt)].float().sum(0, keepdim=True) for prompt in prompts}


def _hidden(base: Checkpoint, mode: str, prompts: Sequence[str]) -> dict[str, Tensor]:
    """By prompt, [L, H]: the state entering each layer, of the last token or averaged over the prompt's."""
    from gnomon.loading import load

    found = {}
    with (
        load(base, max_sequences=1, ledger=False) as model,
        model.module() as module,
        torch.no_grad(),
        progress("reading prompts", total=len(prompts)) as bar,
    ):
        for prompt in prompts:
            ids = torch.tensor([_token_ids(base, prompt)])
            states_LTH = torch.cat(module(input_ids=ids, output_hidden_states=True).hidden_states[:-1]).float()
            found[prompt] = states_LTH.mean(1) if mode == "hidden_avg" else states_LTH[:, -1]
            bar.advance()
    return found


def degenerate(router_LNH: Tensor) -> list[str]:
    """A warning for the layers whose router hardly tells experts apart."""
    bad = [layer for layer, rows in enumerate(router_LNH) if float(torch.linalg.cond(rows)) > DEGENERATE]
    if not bad:
        return []
    where = "every layer" if len(bad) == len(router_LNH) else f"layers {', '.join(map(str, bad))}"
    return [f"The router hardly tells the experts apart in {where}: their prompts are too similar."]
