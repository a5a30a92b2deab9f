"""The C structures of csrc/linear.h, side.h and decoder.h, and a run of layers behind one native call."""

from __future__ import annotations

import ctypes
from typing import Any

from torch import Tensor

from gnomon.kernels.batch import RaggedBatch
from gnomon.kernels.layers import MOST_TABLES, LayerPlan, LayersShape, Weighted
from gnomon.kernels.operators import LinearWeight
from gnomon.kernels.side import SLOTS, SideDelta, SidePath, SideRows

pointer, integer, real = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class NativeWeight(ctypes.Structure):
    _fields_ = [("data", pointer), ("bias", pointer), ("n", integer), ("k", integer), ("kind", integer)]


class NativeLayer(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("query_norm", "key_norm", "post_attention_norm", "post_mlp_norm")),
        *((name, pointer) for name in ("mlp_norm", "following_norm")),
        ("query_key_value", NativeWeight * 3),
        ("attention_out", NativeWeight),
        ("gate_up", NativeWeight * 2),
        ("down", NativeWeight),
        *((name, integer) for name in ("query_key_value_parts", "gate_up_parts", "window", "rotary")),
    ]


class NativeStep(ctypes.Structure):
    _fields_ = [
        *((name, integer) for name in "TCHGDFPR"),
        *((name, real) for name in ("eps", "scale", "softcap")),
        ("gelu", ctypes.c_int32),
        ("cos", pointer * MOST_TABLES),
        ("sin", pointer * MOST_TABLES),
        *((name, pointer) for name in ("tables", "sequence_of", "positions", "slots")),
    ]


class NativeSideDelta(ctypes.Structure):
    _fields_ = [
        *((name, pointer) for name in ("up", "down")),
        *((name, integer) for name in ("outputs", "inputs", "rank", "offset")),
    ]


class NativeSideRows(ctypes.Structure):
    _fields_ = [("begin", integer), ("end", integer), ("patches", pointer), ("count", integer)]


def native_weight(weight: LinearWeight, bias: Tensor | None) -> NativeWeight:
    """The caller keeps both tensors alive while the structure is used."""
    return NativeWeight(weight.data.data_ptr(), _address(bias), weight.n, weight.k, weight.kind)


class NativeLayers:
    """Implements `LayersRun`. The plans' tensors are kept, and read where they lie: weights changed in place count."""

    def __init__(self, library: ctypes.CDLL, plans: list[LayerPlan], shape: LayersShape) -> None:
        self.library = library
        self.plans = plans
        self.shape = shape
        self._layers = (NativeLayer * len(plans))(*map(_native_layer, plans))
        self._pages: Any = None
        self._addresses: tuple[Any, Any] = (None, None)

    def __call__(
        self,
        normed_TC: Tensor,
        residual_TC: Tensor,
        batch: RaggedBatch,
        pages: list[tuple[Tensor, Tensor]],
        turns: list[tuple[Tensor, Tensor]],
        layers: range,
    ) -> None:
        if pages is not self._pages:
            array = pointer * len(pages)
            self._pages = pages
            self._addresses = (array(*(k.data_ptr() for k, _ in pages)), array(*(v.data_ptr() for _, v in pages)))
        s = self.shape
        step = NativeStep(
            *(normed_TC.shape[0], s.hidden, s.heads, s.kv_heads, s.head_dim, s.inner),
            *(batch.page_tables_SP.shape[1], turns[0][0].shape[-1], s.eps, s.scale, s.softcap or 0.0, s.gelu),
            (pointer * MOST_TABLES)(*(cos.data_ptr() for cos, _ in turns)),
            (pointer * MOST_TABLES)(*(sin.data_ptr() for _, sin in turns)),
            *(batch.page_tables_SP.data_ptr(), batch.sequences_T.data_ptr()),
            *(batch.positions_T.data_ptr(), batch.slots_T.data_ptr()),
        )
        groups, _kept = _native_rows(batch.side_rows, layers.start)
        done = self.library.gnomon_layers(
            ctypes.byref(self._layers, layers.start * ctypes.sizeof(NativeLayer)),
            len(layers),
            ctypes.byref(step),
            *(ctypes.byref(array, layers.start * ctypes.sizeof(pointer)) for array in self._addresses),
            normed_TC.data_ptr(),
            residual_TC.data_ptr(),
            groups,
            len(batch.side_rows),
        )
        assert done, "a weight of a kind that this build of the kernels does not know"


def _native_layer(plan: LayerPlan) -> NativeLayer:
    return NativeLayer(
        *map(_address, (plan.query_norm, plan.key_norm, plan.post_attention_norm, plan.post_mlp_norm)),
        *map(_address, (plan.mlp_norm, plan.following_norm)),
        (NativeWeight * 3)(*_weights(plan.query_key_value)),
        *_weights(plan.attention_out),
        (NativeWeight * 2)(*_weights(plan.gate_up)),
        *_weights(plan.down),
        *(len(plan.query_key_value), len(plan.gate_up), plan.window or 0, plan.rotary),
    )


def _native_rows(rows: list[SideRows], first: int) -> tuple[Any, list[Any]]:
    """The groups as a C array, their deltas counted from this layer on, and what must live as long as it is used."""
    if not rows:
        return None, []
    skipped = first * len(SLOTS) * ctypes.sizeof(NativeSideDelta)
    arrays = [(pointer * len(group.paths))(*(_native_path(path) + skipped for path in group.paths)) for group in rows]
    pairs = zip(rows, arrays, strict=True)
    groups = [NativeSideRows(g.begin, g.end, ctypes.addressof(a), len(g.paths)) for g, a in pairs]
    return (NativeSideRows * len(groups))(*groups), arrays


def _native_path(path: SidePath) -> int:
    """The address of a patch's deltas as C structures, made once and kept by the path itself."""
    if not path.native:
        deltas = [delta for layer in path.layers for delta in layer]
        path.native.append((NativeSideDelta * (len(path.layers) * len(SLOTS)))(*map(_native_delta, deltas)))
    return ctypes.addressof(path.native[0])


def _native_delta(delta: SideDelta | None) -> NativeSideDelta:
    if delta is None:
        return NativeSideDelta()
    up, down = delta.up, delta.down
    return NativeSideDelta(up.data.data_ptr(), down.data.data_ptr(), up.n, down.k, up.k, delta.offset)


def _weights(weighted: Weighted) -> list[NativeWeight]:
    return [native_weight(weight, bias) for weight, bias in weighted]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
