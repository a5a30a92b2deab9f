"""Merging plain tensors: `gnomon.merge.method("ties")([a, b], base=c, weight=[1, 1], density=0.5)`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from gnomon.errors import MergeError, UsageError
from gnomon.merge.blocks import TensorView, tensor_reader
from gnomon.merge.randomness import CounterRandomness, Randomness, TorchRandomness
from gnomon.merge.registry import MergeMethod, arithmetic_dtype, find_method


def method(name: str) -> Callable[..., Tensor]:
    """The merge method `name` as a function over tensors. Raises MergeError with the nearest name."""
    found = find_method(name)

    def merge_tensors(
        tensors: Sequence[Tensor],
        *,
        base: Tensor | None = None,
        seed: int | None = None,
        compat: bool = False,
        name: str = "tensor",
        threads: int = 1,
        allow_nonfinite: bool = False,
        **parameters: Any,
    ) -> Tensor:
        if found.learned is not None:
            raise UsageError(f"`{found.name}` looks at whole models: use a merge file (gnomon.merge.merge).")
        random: Randomness = TorchRandomness(seed) if compat else CounterRandomness(seed or 0)
        view = view_of(found, tensors, base, random, name=name, allow_nonfinite=allow_nonfinite)
        view.threads = threads
        return merge_view(found, view, found.resolve(parameters, len(tensors)), result_dtype([*tensors], base))

    merge_tensors.__name__ = found.name
    merge_tensors.__doc__ = (
        f"{found.help}\n\ntensors: the models' (without the base's), all of one shape. Parameters: "
        f"{', '.join(found.parameters) or 'none'}. seed: of the draws; compat: torch's generator, consumed as mergekit "
        "does, and its dtype for the arithmetic. Returns the merged tensor, base included."
    )
    return merge_tensors


def view_of(
    found: MergeMethod,
    tensors: Sequence[Tensor],
    base: Tensor | None,
    random: Randomness,
    *,
    name: str = "tensor",
    allow_nonfinite: bool = False,
) -> TensorView:
    """Checked inputs as a TensorView. Raises UsageError for their number, MergeError for shapes and types."""
    found.check_inputs(len(tensors), base is not None)
    used = base if found.base != "ignored" else None
    everything = [*tensors, *([used] if used is not None else [])]
    for tensor in everything:
        if tensor.shape != everything[0].shape:
            raise MergeError(
                f"`{name}`: shapes differ: {', '.join(str(tuple(t.shape)) for t in everything)}.",
                hint="Models that are merged must have the same network.",
            )
        if not tensor.dtype.is_floating_point:
            raise MergeError(f"`{name}` has type {tensor.dtype}: only floating-point tensors are merged.")
    stored = result_dtype(tensors, used)
    readers = [tensor_reader(tensor) for tensor in tensors]
    base_reader = tensor_reader(used) if used is not None else None
    shape = tuple(everything[0].shape)
    return TensorView(
        name,
        shape,
        readers,
        base_reader,
        arithmetic_dtype(stored),
        random,
        allow_nonfinite=allow_nonfinite,
        stored=stored,
    )


def merge_view(found: MergeMethod, view: TensorView, parameters: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """The whole merged tensor, in memory."""
    out = torch.empty(view.numel, dtype=dtype)
    lock = threading.Lock()

    def write(start: int, rows_RC: Tensor) -> None:
        with lock:
            out[start : start + rows_RC.numel()] = rows_RC.reshape(-1)

    found.run(view, parameters, write)
    return out.reshape(view.shape)


def result_dtype(tensors: Sequence[Tensor], base: Tensor | None) -> torch.dtype:
    """The type that all inputs promote to."""
    everything = [tensor.dtype for tensor in (*tensors, *([base] if base is not None else []))]
    return reduce(torch.promote_types, everything)
