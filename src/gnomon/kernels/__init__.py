"""Canonical operators: `make_operators(dtype)` gives the best implementation this machine has."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from gnomon.errors import UsageError
from gnomon.kernels.threads import available_threads

if TYPE_CHECKING:
    from gnomon.kernels.operators import Operators

__all__ = ["available_threads", "make_operators", "native_reason"]


def make_operators(dtype: str, *, kernel: str | None = None, threads: int | None = None) -> Operators:
    """Operators for a profile. kernel (or GNOMON_KERNEL): "native" | "torch"; default: native when it was built."""
    choice = kernel or os.environ.get("GNOMON_KERNEL")
    if choice not in (None, "native", "torch"):
        raise UsageError(f"Unknown kernel `{choice}`.", hint="Known: native, torch.", param="kernel")
    count = threads or available_threads()
    reason = native_reason()
    if choice == "native" and reason is not None:
        raise UsageError(f"The native kernels are not available: {reason}", hint="`gnomon doctor` says more.")
    if choice == "torch" or reason is not None:
        from gnomon.kernels.torch_operators import TorchOperators

        return TorchOperators(dtype, count)
    made: Operators = _native_room().NativeOperators(dtype, count)
    return made


def native_reason() -> str | None:
    """Why the native kernels are not available; None when they are."""
    try:
        reason: str | None = _native_room().unavailable_reason()
    except ImportError:
        return "this version has none yet; the pure-torch ones are used"
    return reason


def _native_room() -> Any:
    return importlib.import_module("gnomon.kernels.native_operators")
