"""Editing: change what a model knows, as a patch, and measure it.

`edit(model, facts) -> Patch`, `Fact`, `evaluate(model, patch, facts) -> Table`. See docs/edit.md.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from gnomon.capability import Capability

if TYPE_CHECKING:
    from gnomon.edit.api import edit, remember
    from gnomon.edit.evaluation import evaluate
    from gnomon.edit.facts import Fact, Probe
    from gnomon.edit.memory import Memory
    from gnomon.edit.table import Table

__all__ = ["EDIT", "REMEMBER", "Fact", "Memory", "Probe", "Table", "edit", "evaluate", "remember"]

EDIT = Capability(
    name="edit",
    help="Facts to change in the model: built once as a patch, kept by content.",
    options="gnomon.edit.joining:EditOptions",
    weights_stage="gnomon.edit.joining:chosen",
    commands="gnomon.cli.edit:app",
    routes="gnomon.serve.edit:router",
)

REMEMBER = Capability(
    name="remember",
    help="Facts kept beside the model: looked up and put before each question.",
    options="gnomon.edit.remembering:RememberOptions",
    prompt_stage="gnomon.edit.remembering:build",
)

_HOMES = {
    "Memory": "gnomon.edit.memory",
    "edit": "gnomon.edit.api",
    "remember": "gnomon.edit.api",
    "evaluate": "gnomon.edit.evaluation",
    "Fact": "gnomon.edit.facts",
    "Probe": "gnomon.edit.facts",
    "Table": "gnomon.edit.table",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
