"""Row-by-row operators that modules outside the decoder need: softmax, layer norm, plain activations, log-sum-exp.

Contiguous float32 in, new tensors out; natively (csrc/rowwise.h) or, where there is no library, on torch
primitives that do not depend on length. Legend: R rows, K channels, V vocabulary.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from gnomon.kernels import _native
from gnomon.kernels.operators import Operators

ACTIVATIONS = {"silu": 0, "gelu": 1, "sigmoid": 2, "gelu_erf": 3}
pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
SIGNATURES = {
    "gnomon_softmax": [pointer] * 2 + [integer] * 2,
    "gnomon_layer_norm": [pointer] * 4 + [integer] * 2 + [real],
    "gnomon_activate": [integer, pointer, pointer, integer],
    "gnomon_logsumexp": [pointer] * 2 + [integer] * 2,
}


def softmax(operators: Operators, x_RK: Tensor) -> Tensor:
    """Over the last axis."""
    if (library := _library(operators)) is None:
        return torch.softmax(x_RK, dim=-1)
    y_RK, size = torch.empty_like(x_RK), x_RK.shape[-1]
    library.gnomon_softmax(x_RK.data_ptr(), y_RK.data_ptr(), x_RK.numel() // size, size)
    return y_RK


def layer_norm(operators: Operators, x_RK: Tensor, weight_K: Tensor, bias_K: Tensor | None, eps: float) -> Tensor:
    """Over the last axis, biased variance."""
    size = x_RK.shape[-1]
    if (library := _library(operators)) is None:
        return torch.nn.functional.layer_norm(x_RK, (size,), weight_K, bias_K, eps)
    y_RK = torch.empty_like(x_RK)
    bias = None if bias_K is None else bias_K.data_ptr()
    library.gnomon_layer_norm(
        x_RK.data_ptr(), weight_K.data_ptr(), bias, y_RK.data_ptr(), x_RK.numel() // size, size, eps
    )
    return y_RK


def activate(operators: Operators, which: str, x: Tensor) -> Tensor:
    """which: "silu" | "gelu" (the tanh form) | "sigmoid" | "gelu_erf"; any shape."""
    if (library := _library(operators)) is not None:
        y = torch.empty_like(x)
        library.gnomon_activate(ACTIVATIONS[which], x.data_ptr(), y.data_ptr(), x.numel())
        return y
    if which == "gelu":
        inner = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        return 0.5 * x * (1.0 + (1.0 - 2.0 / (1.0 + torch.exp(2.0 * inner))))
    if which == "gelu_erf":
        return _gelu_erf(x.double()).float()
    gate = 1.0 / (1.0 + torch.exp(-x))
    return gate if which == "sigmoid" else x * gate


ERFC = (
    *(1.2274669627272709e-06, 4.639953926570482e-07, -1.3294706457593935e-05, 1.085559250251194e-05),
    *(8.124435953193092e-05, -0.0001959775844027726, -0.00033013778771450033, 0.002029053603502443),
    *(0.0004935176904777743, -0.021523677726912008, 0.005570762865573047, 0.5153126882572084, -0.5014367259303846),
)
"""erfc(z) = t exp(-z^2 + P(t)), t = 2 / (2 + z): P fitted on z in [0, 6], as in csrc/rowwise.h."""


def _gelu_erf(x: Tensor) -> Tensor:
    """x Phi(x) in arithmetic whose bits do not depend on an element's place (torch's erf promises nothing)."""
    z = x.abs() * 0.7071067811865476
    t = 2.0 / (2.0 + z)
    k = (t - 0.625) / 0.375
    p = torch.full_like(k, ERFC[0])
    for term in ERFC[1:]:
        p = p * k + term
    tail = torch.where(z > 6.0, 0.0, 0.5 * (t * torch.exp(p - z * z)))
    return x * torch.where(x < 0.0, tail, 1.0 - tail)


def native_logsumexp(x_RV: Tensor) -> Tensor | None:
    """log(sum(exp(row))) in float64 -> [R], with the bits of engine/elementary.py; None without the native library."""
    if _native.unavailable_reason() is not None:
        return None
    out_R = torch.empty(x_RV.shape[0], dtype=torch.float64)
    _declared(_native.open_library()).gnomon_logsumexp(x_RV.data_ptr(), out_R.data_ptr(), *x_RV.shape)
    return out_R


def _library(operators: Operators) -> ctypes.CDLL | None:
    library: ctypes.CDLL | None = getattr(operators, "library", None)
    return None if library is None else _declared(library)


def _declared(library: ctypes.CDLL) -> ctypes.CDLL:
    for name, arguments in SIGNATURES.items():
        getattr(library, name).argtypes = arguments
        getattr(library, name).restype = None
    return library
