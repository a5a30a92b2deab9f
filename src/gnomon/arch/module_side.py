"""Patches beside a transformers module: hooks that add up (down x) to a module's output while one sequence runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from gnomon.arch.side import cannot_run
from gnomon.kernels.side import SidePath


def module_side_path(model: Any, factors: Mapping[str, tuple[Tensor, Tensor]]) -> SidePath:
    """factors by tensor name: `NAME.weight` of a linear module or an embedding; a tied head follows its embedding."""
    modules = dict(model.named_modules())
    head = next((name for name, module in modules.items() if module is model.get_output_embeddings()), None)
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for tensor, (up, down) in factors.items():
        name = tensor.removesuffix(".weight")
        name = name if name in modules else f"{model.base_model_prefix}.{name}"
        if not tensor.endswith(".weight") or not _is_product(modules.get(name)):
            raise cannot_run(tensor)
        found[name] = (up.float(), down.float())
        if head is not None and modules[name] is model.get_input_embeddings() and _tied(model):
            found[head] = found[name]
    return SidePath(modules=found)


@contextmanager
def running_beside(model: Any, paths: Sequence[SidePath]) -> Iterator[None]:
    """Inside the block the model's modules answer as these patches have it."""
    with ExitStack() as stack:
        for path in paths:
            for name, (up, down) in path.modules.items():
                module = model.get_submodule(name)
                stack.callback(module.register_forward_hook(_hook(module, up, down)).remove)
        yield


def _hook(module: nn.Module, up: Tensor, down: Tensor) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        if isinstance(module, nn.Embedding):
            added = up[x] @ down
        elif isinstance(module, nn.Linear):
            added = (x.float() @ down.T) @ up.T
        else:
            added = (x.float() @ up) @ down  # Conv1D keeps its weight as [inputs, outputs]
        return (output.float() + added).to(output.dtype)

    return hook


def _is_product(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear | nn.Embedding) or type(module).__name__ == "Conv1D"


def _tied(model: Any) -> bool:
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    return outer is not None and inner.weight is outer.weight
