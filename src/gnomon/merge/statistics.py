"""What data-based methods must know of each model: inputs' Gram matrices (RegMean) or the diagonal Fisher information.

Made from a text by running each model once, through its transformers module; kept in the cache by the model's identity,
the text and the kind. Knows nothing of how they are used.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gnomon.errors import UsageError
from gnomon.loading import load
from gnomon.models.cache import cache_dir
from gnomon.models.checkpoint import Checkpoint
from gnomon.progress import progress

if TYPE_CHECKING:
    from gnomon.model import Model

WINDOW = 256
Statistics = dict[str, Tensor]


def statistics(kind: str, checkpoint: Checkpoint, text: str, *, most_tokens: int, seed: int = 0) -> Statistics:
    """By tensor name. kind "gram": [I, I] of each linear layer's inputs; "fisher": of each tensor's own shape."""
    facts = f"{kind}\0{checkpoint.identity}\0{text}\0{most_tokens}\0{seed}\0{WINDOW}"
    file = cache_dir() / "statistics" / f"{hashlib.sha256(facts.encode()).hexdigest()}.safetensors"
    if file.exists():
        return load_file(file)
    with load(checkpoint, max_sequences=1, ledger=False) as model:
        ids = model.encode(text)[:most_tokens]
        windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
        windows = [window for window in windows if len(window) > 1]
        if not windows:
            raise UsageError("The text of `data` is too short: it has fewer than two tokens.", param="data")
        found = {"gram": grams, "fisher": fishers}[kind](model, windows, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    save_file(found, partial)
    partial.replace(file)
    return found


def grams(model: Model, windows: list[list[int]], seed: int) -> Statistics:
    """Sum over tokens of x x^T for the inputs x of every linear layer."""
    found: Statistics = {}

    def hook(name: str) -> Callable[[Any, Any], None]:
        def note(_: Any, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float()
            gram_II = x_TI.T @ x_TI
            found[name] = found[name] + gram_II if name in found else gram_II

        return note

    with model.module() as module:
        linear = {n: m for n, m in module.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n}
        handles = [m.register_forward_pre_hook(hook(f"{name}.weight")) for name, m in linear.items()]
        try:
            with torch.no_grad(), progress("reading inputs", total=len(windows)) as bar:
                for window in windows:
                    module(input_ids=torch.tensor([window]))
                    bar.advance()
        finally:
            for handle in handles:
                handle.remove()
    return found


def fishers(model: Model, windows: list[list[int]], seed: int) -> Statistics:
    """Mean over windows of the squared gradient of sampled labels' log-likelihood."""
    draw = torch.Generator().manual_seed(seed)
    found: Statistics = {}
    with model.module() as module:
        parameters = {name: p for name, p in module.named_parameters() if p.is_floating_point()}
        before = {name: p.requires_grad for name, p in parameters.items()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        try:
            with torch.enable_grad(), progress("measuring", total=len(windows)) as bar:
                for window in windows:
                    logits_TV = module(input_ids=torch.tensor([window])).logits[0].float()
                    labels_T1 = torch.multinomial(logits_TV.detach().softmax(-1), 1, generator=draw)
                    logits_TV.log_softmax(-1).gather(1, labels_T1).sum().backward()
                    for name, parameter in parameters.items():
                        if parameter.grad is not None:
                            square = parameter.grad.detach().float().square() / len(windows)
                            found[name] = found[name] + square if name in found else square
                            parameter.grad = None
                    bar.advance()
        finally:
            for name, parameter in parameters.items():
                parameter.requires_grad_(before[name])
                parameter.grad = None
    return found
