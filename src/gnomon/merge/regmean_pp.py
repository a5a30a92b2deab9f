"""RegMean++ (arXiv 2508.03121): RegMean whose layers see what the merged layers below them give.

Layer by layer: every model's own layer reads, on that model's text, the states that the layers merged so far produce;
the inputs of its linear modules give the Gram matrices; the merged layer takes its place and the states move on. What
is no linear module of a layer is averaged. Runs through the transformers module and holds one model whole.
Legend: T tokens, H hidden channels, O outputs, I inputs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.errors import UsageError
from gnomon.loading import load
from gnomon.merge.data import Data
from gnomon.merge.layout import Layout
from gnomon.merge.methods.regmean import solve
from gnomon.models.checkpoint import Checkpoint
from gnomon.progress import progress

WINDOW = 256
Arguments = Mapping[str, Any]
"""What a layer is called with beside the states (masks, rotary tables)."""


def merged_layers(
    models: Sequence[Checkpoint], texts: Sequence[Data], weight: Sequence[float], alpha: float
) -> dict[str, Tensor]:
    """By tensor name, the merged weight of every linear module inside the layers."""
    layout = Layout.of(models[0])
    stack = layout.main_stack()
    if stack is None:
        raise UsageError("regmean_pp needs a network with numbered layers.")
    with load(models[0], max_sequences=1, ledger=False) as running:
        windows = [_windows(running.encode(text.text)[: text.tokens]) for text in texts]
        with running.module() as own:
            module = copy.deepcopy(own).requires_grad_(False)
    shares = [share / sum(weight) for share in weight]
    for name, parameter in module.named_parameters():
        parameter.copy_(_average([model[name] for model in models], shares))
    layers = module.get_submodule(stack)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        runs = [[_arguments(module, layers, window) for window in own_windows] for own_windows in windows]
        with progress("merging layers", total=len(layers)) as bar:
            for number, layer in enumerate(layers):
                prefix = f"{stack}.{number}."
                linear = {n: m for n, m in layer.named_modules() if isinstance(m, nn.Linear)}
                average = {n: p.clone() for n, p in layer.named_parameters()}
                grams = []
                for model, states in zip(models, runs, strict=True):
                    _put(layer, {n: model[prefix + n].float() for n in average})
                    grams.append(_grams(layer, linear, number, states))
                _put(layer, average)
                for name, part in linear.items():
                    own_OI = [model[f"{prefix}{name}.weight"].double() for model in models]
                    merged = solve(own_OI, [gram[name] for gram in grams], list(weight), alpha).float()
                    part.weight.copy_(merged)
                    found[f"{prefix}{name}.weight"] = merged
                for states in runs:
                    for run in states:
                        run.states_TH = _output(layer, run.states_TH, run.arguments[number])
                bar.advance()
    return found


class _Run:
    """One window on its way up: the states entering the next layer, and each layer's other arguments."""

    def __init__(self, states_TH: Tensor, arguments: list[Arguments]) -> None:
        self.states_TH = states_TH
        self.arguments = arguments


def _windows(ids: list[int]) -> list[list[int]]:
    windows = [ids[start : start + WINDOW] for start in range(0, len(ids), WINDOW)]
    windows = [window for window in windows if len(window) > 1]
    if not windows:
        raise UsageError("The text of `data` is too short: it has fewer than two tokens.", param="data")
    return windows


def _average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = tensors[0].float() * shares[0]
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        total += tensor.float() * share
    return total


def _arguments(module: nn.Module, layers: nn.Module, window: list[int]) -> _Run:
    """Run a window once, to see what every layer is called with."""
    seen: list[tuple[Tensor, Arguments]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(kwargs)
        states = args[0] if args else given.pop("hidden_states")
        seen.append((states, {k: v for k, v in given.items() if "past" not in k and k != "use_cache"}))

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.children()]
    try:
        module(input_ids=torch.tensor([window]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return _Run(seen[0][0], [arguments for _, arguments in seen])


def _output(layer: nn.Module, states_TH: Tensor, arguments: Arguments) -> Tensor:
    out = layer(states_TH, **arguments)
    merged: Tensor = out[0] if isinstance(out, tuple) else out
    return merged


def _put(layer: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in layer.named_parameters():
        parameter.copy_(tensors[name])


def _grams(layer: nn.Module, linear: Mapping[str, nn.Module], number: int, runs: Sequence[_Run]) -> dict[str, Tensor]:
    """[I, I] float64 per linear module: the sum over tokens of x x^T of its inputs."""
    found: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x_TI = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
            found[name] = found.get(name, torch.zeros((), dtype=torch.float64)) + x_TI.T @ x_TI

        return note

    handles = [part.register_forward_pre_hook(hook(name)) for name, part in linear.items()]
    try:
        for run in runs:
            _output(layer, run.states_TH, run.arguments[number])
    finally:
        for handle in handles:
            handle.remove()
    return found
