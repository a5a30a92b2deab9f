"""Editor: one model opened for editing, with everything that methods share.

The transformers module over the model's own weights (read only: nothing is ever written into them), its anatomy,
partial passes, contexts, moments and the profile that says where facts lie. A pending change is worn as a side path, so
that a model goes on serving while it is edited.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gnomon.edit import profiles
from gnomon.edit.anatomy import Anatomy
from gnomon.edit.contexts import Contexts
from gnomon.edit.moments import SELF, Moment, moments
from gnomon.edit.passes import Passes
from gnomon.edit.plain import PLAIN
from gnomon.edit.solve import Factor, Factors
from gnomon.errors import UnsupportedModel, UsageError
from gnomon.kernels.wrappers import Affine, Site, Wrapping, make_wrapper
from gnomon.models.patch import LowRank, Patch

if TYPE_CHECKING:
    from gnomon.model import Model

_OPEN: weakref.WeakKeyDictionary[Any, dict[str, Editor]] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()


class Editor:
    """Made by `Editor.of(model)`, which keeps one per model, so that moments and modules are made once."""

    def __init__(self, model: Model, *, corpus: str = SELF, tokens: int | None = None, seed: int = 0) -> None:
        self.model = model
        self.anatomy = Anatomy.of(_module(model))
        self.passes = Passes(self.anatomy)
        self.profile = profiles.of(model, self.anatomy)
        self.corpus, self.tokens, self.seed = corpus, tokens or self.profile.tokens, seed
        self.standing: tuple[Patch, ...] = ()
        self._busy = threading.RLock()
        self._moments: dict[int, Moment] = {}
        self._factors: dict[tuple[int, float], Factor] = {}

    @classmethod
    def of(cls, model: Model, *, corpus: str = SELF, tokens: int | None = None, seed: int = 0) -> Editor:
        """The editor of a model with these statistics. A model whose weights have changed gets a new one."""
        model = model.unpatched
        key = f"{model.fingerprint}:{corpus}:{tokens}:{seed}"
        with _LOCK:
            known = _OPEN.setdefault(model, {})
            if key not in known:
                known[key] = cls(model, corpus=corpus, tokens=tokens, seed=seed)
            return known[key]

    def layers(self, given: list[int] | None, method: str) -> list[int]:
        """The layers to edit: as given, else the profile's."""
        chosen = given if given is not None else self.profile.layers(method)
        return self.anatomy.check_layers(chosen)

    def layer(self, given: list[int] | None, method: str) -> int:
        """The one layer of a method that edits one. Raises UsageError for several."""
        layers = self.layers(given, method)
        if len(layers) != 1:
            raise UsageError(f"`{method}` edits one layer, not {len(layers)}.", param="layers")
        return layers[0]

    def moment(self, layer: int) -> Moment:
        return self.moments([layer])[layer]

    def moments(self, layers: list[int]) -> dict[int, Moment]:
        """Second moments of the original model, from memory, from the cache, or gathered now."""
        missing = [layer for layer in layers if layer not in self._moments]
        if missing:
            found = moments(self.model, self.passes, missing, corpus=self.corpus, tokens=self.tokens, seed=self.seed)
            self._moments |= found
        return {layer: self._moments[layer] for layer in layers}

    def factor(self, layer: int, ridge: float) -> Factor:
        """C's Cholesky factor, made once per layer and ridge."""
        key = (layer, ridge)
        if key not in self._factors:
            self._factors[key] = Factor.of(self.moment(layer).mean_MM, ridge)
        return self._factors[key]

    def contexts(self, prefixes: int, *, chat: bool, frames: int = 0) -> Contexts:
        return Contexts(self.model, prefixes, chat=chat, frames=frames)

    def low_rank(self, layer: int, factors: Factors) -> LowRank:
        """Factors of a [C, M] change as the delta of the layer's tensor, whichever way round the module stores it."""
        left, right = (factor.float().contiguous() for factor in factors)
        if self.anatomy.downs[layer].transposed:
            return LowRank(right.T.contiguous(), left.T.contiguous())
        return LowRank(left, right)

    def tensor(self, layer: int) -> str:
        return self.anatomy.downs[layer].tensor

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside the block nobody else runs through the module."""
        with self._busy, self.passes.lock:
            yield

    @contextmanager
    def wrapped(self, layer: int, make: Callable[[], Wrapping]) -> Iterator[None]:
        """Inside the block the module's layer acts as the wrapper has it, differentiably. make: called each time."""
        normed: list[Tensor] = []

        def enter(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            normed[:] = [inputs[0]]

        def around(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if isinstance(wrapper := make(), Affine):
                return None
            site = Site(normed[0].flatten(0, -2).float(), inputs[0].flatten(0, -2).float())
            changed = wrapper.around(site, output.flatten(0, -2).float(), PLAIN)
            return changed.view_as(output).to(output.dtype)

        def leave(module: nn.Module, inputs: Any, output: Any) -> Any:
            if not isinstance(wrapper := make(), Affine):
                return None
            stream = output[0] if isinstance(output, tuple) else output
            changed = (stream.float() + wrapper.added(stream.flatten(0, -2), PLAIN).view_as(stream)).to(stream.dtype)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handles = [
            self.anatomy.mlps[layer].register_forward_pre_hook(enter),
            self.anatomy.downs[layer].module.register_forward_hook(around),
            self.anatomy.layers[layer].register_forward_hook(leave),
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def wrappable(self, method: str) -> None:
        """Raises UnsupportedModel where what acts on activations cannot run."""
        from gnomon.arch.decoder import Decoder

        if not isinstance(self.model.network, Decoder):
            raise UnsupportedModel(
                f"`{method}` acts on activations, which works in gnomon's own networks only; `{self.model.name}` "
                "runs through transformers.",
                hint="Edit its weights: rome, memit, ft-m.",
            )

    @contextmanager
    def standing_on(self, patches: Sequence[Patch]) -> Iterator[None]:
        """Inside the block the module is the model with these patches; one edit at a time."""
        layer_of = {self.tensor(layer): layer for layer in range(len(self.anatomy.layers))}
        with self._busy, ExitStack() as worn:
            for patch in patches:
                for name, delta in patch.deltas.items():
                    if name not in layer_of or not isinstance(delta, LowRank):
                        raise UsageError(
                            f"The model wears a patch of `{name}`, which an edit cannot stand on.",
                            hint="Load the patched weights instead: MODEL+FILE.patch.safetensors.",
                        )
                    layer = layer_of[name]
                    turned = self.anatomy.downs[layer].transposed
                    factors = (delta.down.T, delta.up.T) if turned else (delta.up, delta.down)
                    worn.enter_context(self.wearing({layer: factors}))
                for one in patch.wrappers.values():
                    make = partial(make_wrapper, one.kind, one.tensors, gelu=self.anatomy.gelu)
                    worn.enter_context(self.wrapped(one.layer, make))
            self.standing = tuple(patches)
            try:
                yield
            finally:
                self.standing = ()

    @contextmanager
    def wearing(self, pending: Mapping[int, Factors]) -> Iterator[None]:
        """Inside the block the module behaves as if `pending` (factors by layer) were in its weights."""

        def side(left: Tensor, right: Tensor) -> Any:
            left, right = left.float(), right.float()

            def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return output + (inputs[0] @ right.T) @ left.T

            return hook

        handles = [
            self.anatomy.downs[layer].module.register_forward_hook(side(*factors)) for layer, factors in pending.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _module(model: Model) -> nn.Module:
    """The model's weights as a transformers module without gradients. Packed profiles get a float32 copy."""
    from gnomon.arch.module import hf_module
    from gnomon.arch.network import build_network
    from gnomon.kernels import make_operators

    network = model.network
    if network is None:
        raise UnsupportedModel(f"`{model.name}` is an embedding model: it has no facts to edit.")
    if model.profile is not None and model.profile.dtype not in ("fp32", "bf16"):
        network = build_network(model.checkpoint, make_operators("fp32"))
    return hf_module(network, model.checkpoint).requires_grad_(False)
