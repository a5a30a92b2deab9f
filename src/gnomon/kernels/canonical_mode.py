"""`with canonical(): module(...)`: any torch module on the canonical operators, for as long as the block lasts.

Torch functions are replaced as they are called on this thread, and modules that write a reduction out in small steps
(replacements.py) get a canonical forward; neither the module nor its class is changed. The first call of each outermost
module is watched below (watching.py): an operator that is not canonical is an error that names it.
"""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from gnomon.errors import UnsupportedModel
from gnomon.kernels import library, native_reason
from gnomon.kernels.masks import AttentionPlan, plan_attention
from gnomon.kernels.replacements import Forward, attention_scale, replacement
from gnomon.kernels.watching import Coverage, Watch

ops: Any = torch.ops.gnomon
Handler = Callable[..., Any]


@contextmanager
def canonical_block(profile: str, *, check: bool = True) -> Iterator[None]:
    """profile: KERNEL/DTYPE. See `gnomon.kernels.canonical`."""
    library.operators_of(profile)
    state = _State(profile, check)
    with _patched(), _Replacing(state):
        outer = getattr(_here, "state", None)
        _here.state = state
        try:
            yield
        finally:
            _here.state = outer


def profile_name(dtype: str, kernel: str | None) -> str:
    """The profile's name in `torch.ops.gnomon`: KERNEL/DTYPE."""
    chosen = kernel or ("native" if native_reason() is None else "torch")
    return f"{chosen}/{dtype}"


class _Known:
    """What later blocks need not find out again: a class's replacement, a module's rotary tables, who was watched."""

    def __init__(self) -> None:
        self.forwards: dict[type, Forward | None] = {}
        self.rotary: weakref.WeakKeyDictionary[nn.Module, Forward | None] = weakref.WeakKeyDictionary()
        self.passed: weakref.WeakKeyDictionary[nn.Module, set[bool]] = weakref.WeakKeyDictionary()


_known: dict[str, _Known] = defaultdict(_Known)


class _State:
    """One block: what it runs on, and the masks it has seen."""

    def __init__(self, profile: str, check: bool) -> None:
        self.profile = profile
        self.check = check
        self.watch: Watch | None = None
        self.depth = 0
        known = _known[profile]
        self.forwards, self.rotary, self.passed = known.forwards, known.rotary, known.passed
        self.plans: dict[tuple[Any, ...], tuple[Any, AttentionPlan]] = {}

    def forward_of(self, module: nn.Module) -> Forward | None:
        kind = type(module)
        if kind.__name__.endswith("RotaryEmbedding"):  # its tables are the instance's own
            if module not in self.rotary:
                self.rotary[module] = _quietly(module, self.profile)
            return self.rotary[module]
        if kind not in self.forwards:
            self.forwards[kind] = _quietly(module, self.profile)
        return self.forwards[kind]

    def plan(self, mask: Tensor | None, causal: bool, query: Tensor, key: Tensor) -> AttentionPlan:
        """The plan of a mask; the layers of one forward share theirs."""
        shape = (query.shape[0], query.shape[2], key.shape[2])
        where = (id(mask), causal, *shape)
        known = self.plans.get(where)
        if known is not None and (mask is None or known[0]() is mask):
            return known[1]
        with torch.no_grad(), torch.utils._python_dispatch._disable_current_modes():
            found = plan_attention(_seen(mask), causal, *shape)
        if len(self.plans) > 64:
            self.plans.clear()
        self.plans[where] = (None if mask is None else weakref.ref(mask), found)
        return found


def _quietly(module: nn.Module, profile: str) -> Forward | None:
    """Look for a replacement with every mode off: its probe runs stock torch."""
    state, _here.state = _here.state, None
    try:
        with torch._C.DisableTorchFunction(), torch.utils._python_dispatch._disable_current_modes():
            return replacement(module, profile)
    finally:
        _here.state = state


def _seen(mask: Tensor | None) -> Tensor | None:
    """A mask as bool [B, 1, Q, K], True where a key is seen."""
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        out = mask <= torch.finfo(mask.dtype).min / 2
        if bool((mask[~out] != 0).any()):
            raise UnsupportedModel("The attention mask adds a bias to the scores: that has no canonical form.")
        mask = ~out
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    if mask.shape[1] > 1:
        if mask.stride(1) and not bool((mask == mask[:, :1]).all()):
            raise UnsupportedModel("The attention mask differs between heads: that has no canonical form.")
        mask = mask[:, :1]
    return mask


# -- modules --------------------------------------------------------------------------------------------------------

_here = threading.local()
_lock = threading.Lock()
_open_blocks = 0
_stock_call = nn.Module.__call__


@contextmanager
def _patched() -> Iterator[None]:
    """While any block is open, module calls pass by `_call`; on threads without a block it does nothing."""
    global _open_blocks
    with _lock:
        _open_blocks += 1
        nn.Module.__call__ = _call  # type: ignore[method-assign]
    try:
        yield
    finally:
        with _lock:
            _open_blocks -= 1
            if not _open_blocks:
                nn.Module.__call__ = _stock_call  # type: ignore[method-assign]


def _call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    state: _State | None = getattr(_here, "state", None)
    if state is None:
        return _stock_call(module, *args, **kwargs)
    if state.depth == 0 and state.check and module.training not in state.passed.get(module, ()):
        return _watched(state, module, args, kwargs)
    state.depth += 1
    if state.watch is not None:
        state.watch.enter(module)
    try:
        forward = state.forward_of(module)
        if forward is None or "forward" in module.__dict__:
            return _stock_call(module, *args, **kwargs)
        module.__dict__["forward"] = forward.__get__(module)  # hooks run as ever
        try:
            return _stock_call(module, *args, **kwargs)
        finally:
            del module.__dict__["forward"]
    finally:
        state.depth -= 1
        if state.watch is not None:
            state.watch.leave()


def coverage_of(module: nn.Module, args: Any, kwargs: Any, profile: str) -> Coverage:
    """What one call of the module reaches."""
    watch = Watch(module)
    with canonical_block(profile, check=False), torch.no_grad(), watch:
        _here.state.watch = watch
        module(*args, **kwargs)
    return watch.report()


def _watched(state: _State, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """A module's first call: everything it reaches is looked at, and what is not covered refuses it."""
    state.watch = watch = Watch(module)
    state.check = False
    try:
        with watch:
            result = _call(module, *args, **kwargs)
    finally:
        state.watch, state.check = None, True
    watch.raise_if_uncovered()
    state.passed.setdefault(module, set()).add(module.training)
    return result


# -- functions ------------------------------------------------------------------------------------------------------


class _Replacing(TorchFunctionMode):
    """Torch functions that have a canonical form, as they are called."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self.state = state

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = HANDLERS.get(func)
        kwargs = kwargs or {}
        if handler is not None and (result := handler(self.state, *args, **kwargs)) is not NotImplemented:
            return result
        return func(*args, **kwargs)


def _linear(state: _State, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return ops.linear(x, weight, bias, state.profile)  # type: ignore[no-any-return]


def _matmul(state: _State, x: Tensor, other: Tensor, *, out: Any = None) -> Any:
    if x.dim() < 2 or other.dim() != 2 or out is not None:
        return NotImplemented
    return ops.linear(x, other.t(), None, state.profile)


def _addmm(state: _State, bias: Tensor, x: Tensor, other: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if bias.dim() != 1 or beta != 1 or alpha != 1:
        return NotImplemented
    return ops.linear(x, other.t(), bias, state.profile)


def _embedding(state: _State, ids: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    return ops.held(functional.embedding(ids, weight, *args, **kwargs), state.profile)


def _layer_norm(
    state: _State, x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    if len(tuple(shape)) != 1:
        return NotImplemented
    scale = torch.ones(tuple(shape)) if weight is None else ops.held(weight, state.profile)
    return ops.layer_norm(x, scale, None if bias is None else ops.held(bias, state.profile), eps, state.profile)


def _rms_norm(state: _State, x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Any:
    if len(tuple(shape)) != 1:
        return NotImplemented
    scale = torch.ones(tuple(shape)) if weight is None else ops.held(weight, state.profile)
    return ops.rms_norm(x, scale, torch.finfo(x.dtype).eps if eps is None else eps, state.profile)


def _silu(state: _State, x: Tensor, inplace: bool = False) -> Any:
    return NotImplemented if inplace else ops.activate(x, "silu", state.profile)


def _gelu(state: _State, x: Tensor, approximate: str = "none") -> Any:
    return ops.activate(x, "gelu" if approximate == "tanh" else "gelu_erf", state.profile)


def _sigmoid(state: _State, x: Tensor) -> Any:
    return ops.activate(x, "sigmoid", state.profile)


def _over_last(name: str) -> Handler:
    def handler(state: _State, x: Tensor, dim: int | None = None, *args: Any, dtype: Any = None, **_: Any) -> Any:
        if dim not in (-1, x.dim() - 1):
            return NotImplemented
        return getattr(ops, name)(x, state.profile)

    return handler


def _attention(
    state: _State,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    if dropout_p or query.dim() != 4 or key.shape[-1] != value.shape[-1]:
        return NotImplemented
    plan = state.plan(attn_mask, is_causal, query, key)
    parts = (plan.rows_T, plan.positions_T, plan.sequences_T, plan.tables_SP, plan.columns_N, plan.spans_S5)
    factor = attention_scale(scale, query.shape[-1])
    return ops.attention(query, key, value, *parts, plan.window, factor, state.profile)


HANDLERS: dict[Any, Handler] = {
    functional.linear: _linear,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    Tensor.matmul: _matmul,
    Tensor.mm: _matmul,
    Tensor.__matmul__: _matmul,
    torch.addmm: _addmm,
    functional.embedding: _embedding,
    functional.layer_norm: _layer_norm,
    functional.rms_norm: _rms_norm,
    torch.rms_norm: _rms_norm,
    functional.silu: _silu,
    torch.sigmoid: _sigmoid,
    Tensor.sigmoid: _sigmoid,
    functional.sigmoid: _sigmoid,
    functional.gelu: _gelu,
    functional.softmax: _over_last("softmax"),
    torch.softmax: _over_last("softmax"),
    Tensor.softmax: _over_last("softmax"),
    functional.log_softmax: _over_last("log_softmax"),
    torch.log_softmax: _over_last("log_softmax"),
    Tensor.log_softmax: _over_last("log_softmax"),
    functional.scaled_dot_product_attention: _attention,
}
