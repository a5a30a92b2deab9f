"""Weights + weights -> weights.

gnomon.merge.merge("merge.yaml", out="merged")      a merge file, mergekit's format
gnomon.merge.method("ties")([a, b], base=c, ...)    one tensor
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gnomon.capability import Capability

if TYPE_CHECKING:
    from gnomon.merge.build import merge
    from gnomon.merge.registry import merge_method
    from gnomon.merge.tensors import method

__all__ = ["MERGE", "merge", "merge_method", "method"]
_HOMES = {
    "merge": "gnomon.merge.build",
    "method": "gnomon.merge.tensors",
    "merge_method": "gnomon.merge.registry",
}
MERGE = Capability(
    name="merge",
    help="Merge models: mergekit's files, out of core; a merge file is a model reference.",
    resolver="gnomon.merge.build:resolve",
    commands="gnomon.cli.merge:app",
)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'gnomon.merge' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
