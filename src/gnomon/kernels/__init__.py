"""Canonical operators: `make_operators(dtype)` gives the best implementation this machine has.

`with canonical(): module(...)` runs any torch module on them; `coverage(module, ...)` says what it would reach.
"""

from __future__ import annotations

import importlib
import os
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from gnomon.errors import UsageError
from gnomon.kernels.threads import available_threads

if TYPE_CHECKING:
    from torch import nn

    from gnomon.kernels.operators import Operators
    from gnomon.kernels.watching import Coverage

__all__ = ["available_threads", "canonical", "coverage", "kernel_name", "make_operators", "native_reason"]


def canonical(dtype: str = "fp32", *, kernel: str | None = None, check: bool = True) -> AbstractContextManager[None]:
    """Run torch modules on the canonical operators inside the block, on this thread; backward is ordinary torch.

    dtype: "fp32", or "bf16" (float32 weights are rounded before use, so master weights train through the numbers that
    a bf16 engine samples with). kernel: "native" | "torch". check: the first call of each module raises
    UnsupportedModel naming every operator it reaches that is not covered. Activations are float32 throughout.
    """
    from gnomon.kernels.canonical_mode import canonical_block, profile_name

    if dtype not in ("fp32", "bf16"):
        raise UsageError(f"canonical() computes in fp32 or bf16, not `{dtype}`.", param="dtype")
    return canonical_block(profile_name(dtype, kernel), check=check)


def coverage(module: nn.Module, *args: Any, dtype: str = "fp32", **kwargs: Any) -> Coverage:
    """Call the module once under `canonical()` and report which operators it reached, covered or not."""
    from gnomon.kernels.canonical_mode import coverage_of, profile_name

    return coverage_of(module, args, kwargs, profile_name(dtype, None))


def make_operators(
    dtype: str, *, kernel: str | None = None, threads: int | None = None, device: str | None = None
) -> Operators:
    """Operators for a profile. kernel (or GNOMON_KERNEL): "native" | "torch"; default: native when it was built.

    device: "cpu" (default), or "cuda", where the Triton kernels run.
    """
    if device not in (None, "cpu"):
        if device.partition(":")[0] != "cuda":
            raise UsageError(f"gnomon has no kernels for device `{device}`.", hint="Known: cpu, cuda.", param="device")
        if kernel not in (None, "triton"):
            raise UsageError(f"The `{kernel}` kernels do not run on device `{device}`.", param="kernel")
        from gnomon.kernels.triton_operators import TritonOperators

        return TritonOperators(dtype, device)
    count = threads or available_threads()
    if kernel_name(kernel) == "torch":
        from gnomon.kernels.torch_operators import TorchOperators

        return TorchOperators(dtype, count)
    made: Operators = _native_room().NativeOperators(dtype, count)
    return made


def kernel_name(kernel: str | None = None) -> str:
    """Which kernels run on the CPU: what was asked for (kernel, or GNOMON_KERNEL), else native where it was built."""
    choice = kernel or os.environ.get("GNOMON_KERNEL")
    if choice not in (None, "native", "torch"):
        raise UsageError(f"Unknown kernel `{choice}`.", hint="Known: native, torch.", param="kernel")
    reason = native_reason()
    if choice == "native" and reason is not None:
        raise UsageError(f"The native kernels are not available: {reason}", hint="`gnomon doctor` says more.")
    return "torch" if choice == "torch" or reason is not None else "native"


def native_reason() -> str | None:
    """Why the native kernels are not available; None when they are."""
    try:
        reason: str | None = _native_room().unavailable_reason()
    except ImportError:
        return "this version has none yet; the pure-torch ones are used"
    return reason


def _native_room() -> Any:
    return importlib.import_module("gnomon.kernels.native_operators")
