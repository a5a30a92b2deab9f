"""Editing: change what a model knows, as a patch, and measure it.

`edit(model, facts) -> Patch`, `Fact`, `evaluate(model, patch, facts) -> Table`. See docs/edit.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gnomon.capability import Capability

if TYPE_CHECKING:
    from gnomon.edit.api import edit
    from gnomon.edit.evaluation import evaluate
    from gnomon.edit.facts import Fact, Probe
    from gnomon.edit.table import Table

__all__ = ["EDIT", "Fact", "Probe", "Table", "edit", "evaluate"]

EDIT = Capability(
    name="edit",
    help="Facts to change in the model: built once as a patch, kept by content.",
    options="gnomon.edit.joining:EditOptions",
    weights_stage="gnomon.edit.joining:chosen",
    commands="gnomon.cli.edit:app",
    routes="gnomon.serve.edit:router",
)

_HOMES = {
    "edit": "gnomon.edit.api",
    "evaluate": "gnomon.edit.evaluation",
    "Fact": "gnomon.edit.facts",
    "Probe": "gnomon.edit.facts",
    "Table": "gnomon.edit.table",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
