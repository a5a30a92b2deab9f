"""The transformers module over a network's own tensors: gradients, hooks, interventions, without a second copy."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gnomon.arch.network import Network
from gnomon.errors import MissingExtra, UnsupportedModel
from gnomon.models.checkpoint import Checkpoint


def hf_module(network: Network, checkpoint: Checkpoint) -> nn.Module:
    """A transformers causal LM whose parameters ARE the network's tensors (same memory), in eval mode.

    Raises UsageError for packed profiles, MissingExtra without transformers, UnsupportedModel when a parameter of the
    module has no tensor here.
    """
    live = network.tensors()
    try:
        from transformers import AutoConfig, AutoModelForCausalLM
    except ImportError:
        raise MissingExtra("model.module()", "transformers") from None
    config = AutoConfig.for_model(**checkpoint.config)
    with torch.device("meta"):
        module: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, tensor in live.items():
        _place(module, name, tensor)
    module.tie_weights()  # type: ignore[operator]
    _restore_buffers(module, config)
    empty = [name for name, parameter in module.named_parameters() if parameter.is_meta]
    if empty:
        raise UnsupportedModel(f"{checkpoint.reference}: the transformers module has `{empty[0]}`, which is not here.")
    return module.eval()


def _place(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Make `tensor` the parameter of that dotted name."""
    path, _, last = name.rpartition(".")
    setattr(module.get_submodule(path), last, nn.Parameter(tensor))


def _restore_buffers(module: nn.Module, config: object) -> None:
    """Tables that a module computes when it is made (rotary frequencies, scales) are made again, outside `meta`."""
    for name, part in list(module.named_modules()):
        if not any(buffer.is_meta for buffer in part.buffers(recurse=False)):
            continue
        if "Rotary" in type(part).__name__:
            path, _, last = name.rpartition(".")
            setattr(module.get_submodule(path), last, type(part)(config=config))
        elif hasattr(part, "scalar_embed_scale"):
            part.embed_scale = torch.tensor(part.scalar_embed_scale)
        else:
            raise UnsupportedModel(f"The transformers module `{name}` keeps a table that cannot be rebuilt.")
