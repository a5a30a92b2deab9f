"""Passes: forward through part of a decoder, so that an edit computes only what it needs.

Two ideas. A forward can stop at the highest layer asked for. And while a value is optimised at (layer, position),
nothing below the layer and nothing before the position changes: keys and values of earlier tokens and the hidden
states that enter the layer are computed once, and each step runs only the later tokens through the upper layers.
In go token ids; out come inputs and outputs of MLP projections, and logits. Knows nothing of facts or text.
Legend: B sequences, T tokens, P past tokens, S active tokens, C hidden, M inner channels, V vocabulary.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.edit.anatomy import Anatomy


class _Reached(Exception):
    """The forward has come as far as it was needed."""


@dataclass(frozen=True)
class Rows:
    """Sequences of unequal length in one batch, aligned so that their edited token stands at index P in all of them.

    ids_BT, mask_BT: [B, P + S], padded left of the past and right of the active part. past: P.
    """

    ids_BT: Tensor
    mask_BT: Tensor
    positions_BT: Tensor
    past: int

    @classmethod
    def align(cls, sequences: Sequence[Sequence[int]], edited: Sequence[int], pad: int = 0) -> Rows:
        """sequences: token ids. edited: index of each one's edited token."""
        past = max(edited)
        active = max(len(ids) - place for ids, place in zip(sequences, edited, strict=True))
        ids_BT = torch.full((len(sequences), past + active), pad)
        mask_BT = torch.zeros_like(ids_BT)
        for row, (ids, place) in enumerate(zip(sequences, edited, strict=True)):
            start = past - place
            ids_BT[row, start : start + len(ids)] = torch.tensor(ids)
            mask_BT[row, start : start + len(ids)] = 1
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        return cls(ids_BT, mask_BT, positions_BT, past)


@dataclass(frozen=True)
class Captured:
    """What one full forward left behind at one layer, for `Passes.above`.

    key_BM, output_BC: input and output of the layer's down projection at the edited token. layer_BC: the layer's output
    there. entering_BSC: hidden states that enter the layer at the active tokens. pasts: keys and values per layer.
    """

    rows: Rows
    layer: int
    key_BM: Tensor
    output_BC: Tensor
    layer_BC: Tensor
    entering_BSC: Tensor
    pasts: list[tuple[Tensor, Tensor]]
    hidden_BSC: Tensor


class Passes:
    """Partial forwards over one module. Hooks are held under a lock: one pass at a time."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.lock = threading.RLock()
        named = inspect.signature(type(anatomy.base).forward).parameters
        self._cache_name = "cache" if "cache" in named else "past_key_values"

    def keys(self, rows: Rows, layers: Sequence[int]) -> dict[int, Tensor]:
        """Inputs of the down projections at every token, by layer -> [B, T, M]; stops at the highest layer."""
        return self._inputs(rows, {layer: self.anatomy.downs[layer].module for layer in layers})

    def mlp_inputs(self, rows: Rows, layers: Sequence[int]) -> dict[int, Tensor]:
        """Inputs of the MLPs (after their norm) at every token, by layer -> [B, T, C]; stops at the highest layer."""
        return self._inputs(rows, {layer: self.anatomy.mlps[layer] for layer in layers})

    @torch.no_grad()
    def layer_outputs(self, rows: Rows, layer: int) -> Tensor:
        """The layer's output at every token -> [B, T, C]; stops there."""
        found: list[Tensor] = []

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            found.append(_tensor(output))
            raise _Reached

        with self.lock, _hooks([self.anatomy.layers[layer].register_forward_hook(leave)]), suppress(_Reached):
            self._base(rows.ids_BT, rows.mask_BT, rows.positions_BT)
        return found[0]

    @torch.no_grad()
    def _inputs(self, rows: Rows, modules: dict[int, nn.Module]) -> dict[int, Tensor]:
        found: dict[int, Tensor] = {}
        last = max(modules)

        def keep(layer: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                found[layer] = inputs[0]
                if layer == last:
                    raise _Reached

            return hook

        handles = [module.register_forward_pre_hook(keep(layer)) for layer, module in modules.items()]
        with self.lock, _hooks(handles), suppress(_Reached):
            self._base(rows.ids_BT, rows.mask_BT, rows.positions_BT)
        return found

    @torch.no_grad()
    def sites(self, rows: Rows, layer: int, last: int, *, at_layer: bool) -> tuple[Tensor, Tensor]:
        """At the edited token: the key at `layer` [B, M], and the output of layer `last` (or of its MLP) [B, C]."""
        found: dict[str, Tensor] = {}
        at = rows.past

        def key(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            found["key"] = inputs[0][:, at].clone()

        def leave(module: nn.Module, inputs: Any, output: Any) -> None:
            found["output"] = _tensor(output)[:, at].clone()
            raise _Reached

        site = self.anatomy.layers[last] if at_layer else self.anatomy.downs[last].module
        handles = [
            self.anatomy.downs[layer].module.register_forward_pre_hook(key),
            site.register_forward_hook(leave),
        ]
        with self.lock, _hooks(handles), suppress(_Reached):
            self._base(rows.ids_BT, rows.mask_BT, rows.positions_BT)
        return found["key"], found["output"]

    @torch.no_grad()
    def capture(self, rows: Rows, layer: int) -> Captured:
        """One full forward, keeping what `above` needs at `layer`."""
        from transformers import DynamicCache

        kept: dict[str, Tensor] = {}
        at = rows.past

        def entering(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            kept["entering"] = hidden[:, at:].clone()

        def leaving(module: nn.Module, args: Any, output: Any) -> None:
            kept["layer"] = _tensor(output)[:, at].clone()

        def down(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept["key"], kept["output"] = inputs[0][:, at].clone(), output[:, at].clone()

        block = self.anatomy.layers[layer]
        cache = DynamicCache()
        with (
            self.lock,
            _hooks(
                [
                    block.register_forward_pre_hook(entering, with_kwargs=True),
                    block.register_forward_hook(leaving),
                    self.anatomy.downs[layer].module.register_forward_hook(down),
                ]
            ),
        ):
            hidden = self._base(rows.ids_BT, rows.mask_BT, rows.positions_BT, cache)
        pasts = [(part.keys[:, :, :at].clone(), part.values[:, :, :at].clone()) for part in cache.layers]
        return Captured(
            rows, layer, kept["key"], kept["output"], kept["layer"], kept["entering"], pasts, hidden[:, at:].clone()
        )

    def above(self, captured: Captured, change: Callable[[Tensor], Tensor], *, at_layer: bool = False) -> Tensor:
        """Run the active tokens from the captured layer upwards, differentiably -> final hidden states [B, S, C].

        change: [B, C] -> [B, C], applied at the edited token to the down projection's output (or to the layer's).
        """
        rows, layer = captured.rows, captured.layer

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (captured.entering_BSC, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": captured.entering_BSC}

        def alter(module: nn.Module, args: Any, output: Any) -> Any:
            whole = _tensor(output)
            changed = torch.cat([change(whole[:, 0])[:, None], whole[:, 1:]], dim=1)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        block = self.anatomy.layers[layer]
        site = block if at_layer else self.anatomy.downs[layer].module
        cache = _past_cache(captured.pasts)
        with (
            self.lock,
            skipped(self.anatomy.layers[:layer]),
            _hooks(
                [
                    block.register_forward_pre_hook(enter, with_kwargs=True),
                    site.register_forward_hook(alter),
                ]
            ),
        ):
            return self._base(rows.ids_BT[:, rows.past :], rows.mask_BT, rows.positions_BT[:, rows.past :], cache)

    def _base(self, ids_BT: Tensor, mask_BT: Tensor, positions_BT: Tensor, cache: Any = None) -> Tensor:
        arguments = {"use_cache": True, self._cache_name: cache} if cache is not None else {"use_cache": False}
        out = self.anatomy.base(input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, **arguments)
        hidden: Tensor = out.last_hidden_state
        return hidden


def _tensor(output: Any) -> Tensor:
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def skipped(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Layers that hand their input on: what they would compute is replaced afterwards anyway."""

    def hand_on(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states

    for layer in layers:
        layer.forward = hand_on
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _past_cache(pasts: list[tuple[Tensor, Tensor]]) -> Any:
    """A cache that shows the past and keeps nothing, so that every step starts from the same state."""
    from transformers import DynamicCache

    length = pasts[0][0].shape[2]

    class Past(DynamicCache):  # type: ignore[misc]
        def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = pasts[layer_idx]
            return torch.cat([keys, key_states], dim=2), torch.cat([values, value_states], dim=2)

        def get_seq_length(self, layer_idx: int = 0) -> int:
            return length

        def get_query_offset(self, layer_idx: int = 0) -> int:
            return length

        def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
            new = query_length if isinstance(query_length, int) else int(query_length.shape[0])
            return length + new, 0

    return Past()
