"""The canonical operators in torch's library, as `torch.ops.gnomon.*`, each with a gradient.

Forward: the operators of the profile that is named (`"native/fp32"`, `"torch/bf16"`, ...), float32 activations, row by
row in one fixed order. Backward: ordinary torch. A bf16 profile rounds float32 weights before it uses them, so that
float32 master weights are trained through the very numbers that the engine samples with.
Legend: ... leading axes, K inputs, N outputs, B batch, H query heads, G key-value heads, Q rows, D head size; S, T, P:
see masks.py.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from gnomon.kernels import make_operators, rowwise
from gnomon.kernels.batch import PAGE, RaggedBatch, Span
from gnomon.kernels.operators import Operators


@cache
def operators_of(profile: str) -> Operators:
    """profile: KERNEL/DTYPE. The thread count stays what the process has."""
    kernel, _, dtype = profile.partition("/")
    return make_operators(dtype, kernel=kernel, threads=torch.get_num_threads())


def _plain(x: Tensor) -> Tensor:
    return x.detach().to(torch.float32).contiguous()


def _as_held(weight: Tensor, profile: str) -> Tensor:
    """A weight's values as the profile has them, in float32."""
    return (weight.to(torch.bfloat16) if profile.endswith("/bf16") else weight).to(torch.float32)


def _gradients(*wanted: tuple[bool, Any]) -> tuple[Tensor | None, ...]:
    return tuple(make() if needed else None for needed, make in wanted)


# -- products -------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gnomon::linear", mutates_args=())
def linear(x: Tensor, weight: Tensor, bias: Tensor | None, profile: str) -> Tensor:
    """x [..., K] W^T + b -> [..., N] float32."""
    operators = operators_of(profile)
    held = None if bias is None else _as_held(bias.detach(), profile)
    y = operators.linear(_plain(x).reshape(-1, x.shape[-1]), operators.linear_weight(weight.detach()), held)
    return y.reshape(*x.shape[:-1], weight.shape[0])


@linear.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, profile: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]), dtype=torch.float32)


def _linear_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, bias, profile = inputs
    ctx.save_for_backward(x, weight)
    ctx.profile, ctx.bias = profile, None if bias is None else bias.dtype


def _linear_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        need_x, need_weight, need_bias, _ = ctx.needs_input_grad
        return *_gradients(
            (need_x, lambda: (grad @ _as_held(weight, ctx.profile)).to(x.dtype)),
            (need_weight, lambda: (rows.t() @ x.reshape(-1, x.shape[-1]).float()).to(weight.dtype)),
            (need_bias, lambda: rows.sum(0).to(ctx.bias)),
        ), None


linear.register_autograd(_linear_backward, setup_context=_linear_setup)


@torch.library.custom_op("gnomon::held", mutates_args=())
def held(weight: Tensor, profile: str) -> Tensor:
    """A weight (or rows of one) as the profile holds it, in float32; the gradient passes unrounded."""
    return _as_held(weight.detach(), profile).clone()


@held.register_fake
def _(weight: Tensor, profile: str) -> Tensor:
    return torch.empty_like(weight, dtype=torch.float32)


held.register_autograd(
    lambda ctx, grad: (grad.to(ctx.dtype), None),
    setup_context=lambda ctx, inputs, output: setattr(ctx, "dtype", inputs[0].dtype),
)


# -- norms ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gnomon::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float, profile: str) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * w over the last axis; weight float32 [K], as it is."""
    return operators_of(profile).rms_norm(_plain(x), _plain(weight), eps)


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float, profile: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _norm_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight)
    ctx.eps = inputs[-2]


def _rms_norm_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        x, weight = ctx.saved_tensors
        scale = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + ctx.eps)
        normed = x.float() * scale
        along = grad * weight.float()
        need_x, need_weight, *_ = ctx.needs_input_grad
        return (
            *_gradients(
                (need_x, lambda: (scale * (along - normed * (along * normed).mean(-1, keepdim=True))).to(x.dtype)),
                (need_weight, lambda: (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)),
            ),
            None,
            None,
        )


rms_norm.register_autograd(_rms_norm_backward, setup_context=_norm_setup)


@torch.library.custom_op("gnomon::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, profile: str) -> Tensor:
    """Layer norm over the last axis; weight and bias float32 [K], as they are."""
    plain = None if bias is None else _plain(bias)
    return rowwise.layer_norm(operators_of(profile), _plain(x), _plain(weight), plain, eps)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, profile: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _layer_norm_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        x, weight = ctx.saved_tensors
        centred = x.float() - x.float().mean(-1, keepdim=True)
        scale = torch.rsqrt(centred.pow(2).mean(-1, keepdim=True) + ctx.eps)
        normed = centred * scale
        along = grad * weight.float()
        need_x, need_weight, need_bias, *_ = ctx.needs_input_grad

        def of_x() -> Tensor:
            mean = along.mean(-1, keepdim=True)
            raw: Tensor = scale * (along - mean - normed * (along * normed).mean(-1, keepdim=True))
            return raw.to(x.dtype)

        return (
            *_gradients(
                (need_x, of_x),
                (need_weight, lambda: (grad * normed).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)),
                (need_bias, lambda: grad.reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)),
            ),
            None,
            None,
        )


layer_norm.register_autograd(_layer_norm_backward, setup_context=_norm_setup)


# -- rows and elements ----------------------------------------------------------------------------------------------


@torch.library.custom_op("gnomon::softmax", mutates_args=())
def softmax(x: Tensor, profile: str) -> Tensor:
    """Softmax over the last axis."""
    return rowwise.softmax(operators_of(profile), _plain(x))


@torch.library.custom_op("gnomon::log_softmax", mutates_args=())
def log_softmax(x: Tensor, profile: str) -> Tensor:
    """Log softmax over the last axis: the float64 log-probability, rounded once."""
    plain = _plain(x)
    normaliser = rowwise.native_logsumexp(plain.reshape(-1, x.shape[-1])) if profile.startswith("native/") else None
    if normaliser is None:
        return torch.log_softmax(plain, -1)
    return (plain.double() - normaliser.reshape(*x.shape[:-1], 1)).float()


@torch.library.custom_op("gnomon::activate", mutates_args=())
def activate(x: Tensor, which: str, profile: str) -> Tensor:
    """which: "silu" | "gelu" (the tanh form) | "gelu_erf" | "sigmoid"."""
    return rowwise.activate(operators_of(profile), which, _plain(x))


@softmax.register_fake
def _(x: Tensor, profile: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@log_softmax.register_fake
def _(x: Tensor, profile: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


@activate.register_fake
def _(x: Tensor, which: str, profile: str) -> Tensor:
    return x.new_empty(x.shape, dtype=torch.float32)


def _keep_output(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(output)
    ctx.dtype = inputs[0].dtype


def _softmax_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        (y,) = ctx.saved_tensors
        return (y * (grad - (grad * y).sum(-1, keepdim=True))).to(ctx.dtype), None


def _log_softmax_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        (y,) = ctx.saved_tensors
        return (grad - y.exp() * grad.sum(-1, keepdim=True)).to(ctx.dtype), None


softmax.register_autograd(_softmax_backward, setup_context=_keep_output)
log_softmax.register_autograd(_log_softmax_backward, setup_context=_keep_output)


def _activate_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.save_for_backward(inputs[0])
    ctx.which = inputs[1]


def _activate_backward(ctx: Any, grad: Tensor) -> Any:
    with torch._C.DisableTorchFunction():
        (x,) = ctx.saved_tensors
        if ctx.which == "silu":
            of_x = torch.ops.aten.silu_backward(grad, x.float())
        elif ctx.which == "gelu":
            of_x = torch.ops.aten.gelu_backward(grad, x.float(), approximate="tanh")
        elif ctx.which == "gelu_erf":
            of_x = torch.ops.aten.gelu_backward(grad, x.float())
        else:
            gate = torch.sigmoid(x.float())
            of_x = grad * gate * (1 - gate)
        return of_x.to(x.dtype), None, None


activate.register_autograd(_activate_backward, setup_context=_activate_setup)


# -- attention ------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gnomon::attention", mutates_args=())
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rows_T: Tensor,
    positions_T: Tensor,
    sequences_T: Tensor,
    tables_SP: Tensor,
    columns_N: Tensor,
    spans_S5: Tensor,
    window: int,
    scale: float,
    profile: str,
) -> Tensor:
    """query [B, H, Q, D], key and value [B, G, K, D], and an AttentionPlan's parts -> [B, H, Q, D]; padding gives 0."""
    batch, heads, queries, size = query.shape
    out = torch.zeros(batch * queries, heads, size)
    if len(rows_T):
        packed_THD = _plain(query.transpose(1, 2)).reshape(-1, heads, size)[rows_T]
        contexts_S = spans_S5[:, 2].to(torch.int32)
        counts = spans_S5[:, 4]
        nothing = torch.zeros(0, dtype=torch.int64)
        pages = zip(counts.tolist(), (-(-contexts_S // PAGE)).tolist(), tables_SP.tolist(), strict=True)
        ragged = RaggedBatch(
            spans=[Span(index, [0] * rows, 0, own[:most]) for index, (rows, most, own) in enumerate(pages)],
            token_ids_T=nothing,
            positions_T=positions_T,
            slots_T=nothing,
            sequences_T=sequences_T,
            starts_S=torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32),
            contexts_S=contexts_S,
            page_tables_SP=tables_SP,
            wanted_rows_R=nothing,
        )
        keys, values = _in_pages(key, columns_N), _in_pages(value, columns_N)
        mixed = operators_of(profile).attention(packed_THD, keys, values, ragged, scale=scale, window=window or None)
        out[rows_T] = mixed.reshape(-1, heads, size)
    return out.reshape(batch, queries, heads, size).transpose(1, 2).contiguous()


def _in_pages(keys_BGKD: Tensor, columns_N: Tensor) -> Tensor:
    """-> [pages, G, PAGE, D]."""
    groups, size = keys_BGKD.shape[1], keys_BGKD.shape[3]
    flat = keys_BGKD.detach().float().transpose(1, 2).reshape(-1, groups, size)
    return flat[columns_N].reshape(-1, PAGE, groups, size).transpose(1, 2).contiguous()


@attention.register_fake
def _(query: Tensor, *others: Any) -> Tensor:
    return query.new_empty(query.shape, dtype=torch.float32)


def _attention_setup(ctx: Any, inputs: Any, output: Tensor) -> None:
    query, key, value, _, _, _, _, _, spans_S5, window, scale, _ = inputs
    ctx.save_for_backward(query, key, value, inputs[4], spans_S5)
    ctx.window, ctx.scale = window, scale


def _attention_backward(ctx: Any, grad: Tensor) -> Any:
    """Torch's own attention once more, text by text (texts of one shape together), and its gradient."""
    with torch._C.DisableTorchFunction(), torch.enable_grad():
        query, key, value, positions_T, spans_S5 = ctx.saved_tensors
        results = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (query, key, value)]
        offsets = [0, *spans_S5[:, 4].cumsum(0).tolist()]
        alike: dict[tuple[Any, ...], list[tuple[int, ...]]] = {}
        for index, (b, start, length, row, count) in enumerate(spans_S5.tolist()):
            last = positions_T[offsets[index] : offsets[index + 1]]
            alike.setdefault((length, count, tuple(last[[0, -1]].tolist())), []).append((b, start, row, index))
        for (length, count, _), group in alike.items():
            first = offsets[group[0][3]]
            seen = _seen(positions_T[first : first + count], length, ctx.window)

            def cut(tensor: Tensor, at: list[int], size: int, group: Any = group) -> Tensor:
                parts = [tensor[b, :, low : low + size] for (b, *_), low in zip(group, at, strict=True)]
                return torch.stack(parts).detach().float()

            rows, starts = [entry[2] for entry in group], [entry[1] for entry in group]
            pieces = [cut(query, rows, count), cut(key, starts, length), cut(value, starts, length)]
            leaves = [piece.requires_grad_() for piece in pieces]
            out = functional.scaled_dot_product_attention(
                leaves[0],
                leaves[1],
                leaves[2],
                attn_mask=seen,
                is_causal=seen is None,
                scale=ctx.scale,
                enable_gqa=query.shape[1] != key.shape[1],
            )
            found = torch.autograd.grad(out, leaves, cut(grad, rows, count))
            for part, gradient, at in zip(results, found, (rows, starts, starts), strict=True):
                for (b, *_), low, own in zip(group, at, gradient, strict=True):
                    part[b, :, low : low + own.shape[1]] += own
        of = [part.to(tensor.dtype) for part, tensor in zip(results, (query, key, value), strict=True)]
        return *of, *[None] * 9


def _seen(last_Q: Tensor, length: int, window: int) -> Tensor | None:
    """The mask of one text, True where a key is seen; None for plain causal."""
    if len(last_Q) == length and not (window and window < length) and bool((last_Q == torch.arange(length)).all()):
        return None
    column_K = torch.arange(length)
    seen = column_K <= last_Q[:, None]
    return seen & (column_K > last_Q[:, None] - window) if window else seen


attention.register_autograd(_attention_backward, setup_context=_attention_setup)
