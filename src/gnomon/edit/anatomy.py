"""Anatomy: where the parts of a decoder are that editing needs, found by structure and not by a list of names.

In goes a transformers causal LM; out come its layers, each layer's second MLP projection ("down", the matrix that
ROME-like methods write into) and its head. Knows nothing of facts. Refuses what it cannot edit, with the reason.
Legend: C hidden channels, M inner channels of the MLP.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gnomon.errors import UnsupportedModel, UsageError


@dataclass(frozen=True)
class Down:
    """One layer's second MLP projection. weight_CM is a view in [C, M] orientation, whatever the module stores."""

    name: str
    module: nn.Module
    transposed: bool

    @property
    def tensor(self) -> str:
        """The weight's Hugging Face name."""
        return f"{self.name}.weight"

    @property
    def weight_CM(self) -> Tensor:
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        return weight.detach().T if self.transposed else weight.detach()


@dataclass(frozen=True)
class Anatomy:
    """A decoder's parts. post_norm: a norm lies between the MLP and the residual stream (Gemma 2 and 3, OLMo 2).
    gelu: the MLP's activation is not SiLU.
    """

    module: Any
    base: Any
    layers: tuple[nn.Module, ...]
    layer_names: tuple[str, ...]
    downs: tuple[Down, ...]
    hidden: int
    inner: int
    post_norm: bool
    softcap: float | None
    gelu: bool

    @property
    def mlps(self) -> tuple[nn.Module, ...]:
        """Every layer's MLP: what holds its down projection."""
        return tuple(self.module.get_submodule(down.name.rpartition(".")[0]) for down in self.downs)

    @classmethod
    def of(cls, module: nn.Module) -> Anatomy:
        """Raises UnsupportedModel for networks without dense MLPs (experts, RWKV, Mamba) or with packed weights."""
        config: Any = module.config
        text = getattr(config, "text_config", config)
        hidden = int(getattr(text, "hidden_size", 0) or getattr(text, "n_embd", 0))
        count = int(getattr(text, "num_hidden_layers", 0) or getattr(text, "n_layer", 0))
        name, layers = _layers(module, count)
        downs = tuple(_down(f"{name}.{i}", layer, hidden) for i, layer in enumerate(layers))
        return cls(
            module=module,
            base=module.base_model,
            layers=layers,
            layer_names=tuple(f"{name}.{i}" for i in range(count)),
            downs=downs,
            hidden=hidden,
            inner=downs[0].weight_CM.shape[1],
            post_norm=any("post_feedforward" in part for part, _ in layers[0].named_children()),
            softcap=getattr(text, "final_logit_softcapping", None),
            gelu="gelu" in str(getattr(text, "hidden_activation", None) or getattr(text, "hidden_act", "")),
        )

    def check_layers(self, layers: list[int]) -> list[int]:
        """Layer numbers as non-negative, ascending. Raises UsageError for one that is not there."""
        count = len(self.layers)
        for layer in layers:
            if not -count <= layer < count:
                raise UsageError(f"Layer {layer} is not there: the model has layers 0..{count - 1}.", param="layers")
        return sorted({layer % count for layer in layers})

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., C] after the final norm -> [..., V], float32."""
        head: Any = self.module.get_output_embeddings()
        logits: Tensor = head(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def _layers(module: nn.Module, count: int) -> tuple[str, tuple[nn.Module, ...]]:
    """The list of decoder layers: the one ModuleList of the configured length."""
    found = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count > 0]
    if not found:
        raise UnsupportedModel(f"`{type(module).__name__}` has no list of decoder layers: it cannot be edited.")
    name, layers = found[0]
    return name, tuple(layers)


def _down(at: str, layer: nn.Module, hidden: int) -> Down:
    """The last projection back to C channels that is not the attention's."""
    if any("expert" in name.lower() for name, _ in layer.named_modules()):
        raise UnsupportedModel(f"`{at}` is a mixture of experts: its facts lie in many MLPs; editing is refused.")
    found: list[Down] = []
    for name, part in layer.named_modules():
        weight = getattr(part, "weight", None)
        if "attn" in name.lower() or "attention" in name.lower() or not isinstance(weight, Tensor) or weight.dim() != 2:
            continue
        transposed = type(part).__name__ == "Conv1D"
        out, inner = tuple(weight.T.shape) if transposed else tuple(weight.shape)
        if out == hidden and inner != hidden:
            found.append(Down(f"{at}.{name}", part, transposed))
    if not found:
        raise UnsupportedModel(
            f"`{at}` has no dense MLP projection back to {hidden} channels.",
            hint="Packed (GPTQ, AWQ), RWKV and Mamba networks cannot be edited.",
        )
    return found[-1]
