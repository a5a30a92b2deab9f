"""What a room registers to join the command, the recipe, the request and the server.

A room registers ONE `Capability` under the entry-point group `gnomon.capabilities`, which `registry.py` reads; nothing
above or below is edited. Knows nothing of what any stage does, and imports no room.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from pydantic import BaseModel

PHASES = ("fuse", "bias", "mask")


class Origin(Enum):
    """Where options came from. A REQUEST is untrusted: it may not name files, code, models or URLs."""

    PYTHON = "python"
    COMMAND = "command line"
    RECIPE = "recipe"
    REQUEST = "request"


class _OperatorOnly:
    """Marks an options field that a request may not set: `policy: Annotated[Path, OPERATOR_ONLY]`."""

    def __repr__(self) -> str:
        return "OPERATOR_ONLY"


OPERATOR_ONLY = _OperatorOnly()


@dataclass(frozen=True)
class Flag:
    """One more command-line flag of a capability. parse: `parse(text)` -> its options mapping (an import string)."""

    name: str
    help: str
    parse: str


@dataclass(frozen=True)
class Resolved:
    """What a resolver makes of a reference: a model and option defaults, or a way to open the model itself.

    open: given loading.LoadSettings, returns a running Model. settings: how to load it where the caller does not say
    (fields of LoadSettings).
    """

    model: Any
    defaults: Mapping[str, Any]
    open: Callable[[Any], Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Capability:
    """One word, and how it joins. Strings of the form "package.module:attribute" are imported when first used.

    options: pydantic model (or its import string). inline: its fields stand at top level, as sampling's do.
    logits_stage / stream_stage: `build(options, context)` -> stage or None. weights_stage: `chosen(options, context)`
    -> names of loaded patches that run beside the weights of this request. parse: `parse(text)` -> options mapping for
    a command-line string that is neither JSON nor @file. flags: further ways to say the options on the command line.
    runner: the kind of Model that the options need. conflicts: (other capability, why the pair is refused).
    prompt_stage: `build(options, context)` -> PromptStage or None. stream_order: stream stages act by it, then by name.
    prompt_ids: `trim(options, ids, context)` -> the ids of a raw prompt to begin with; `healed` in the context's memory
    is text that is generated again and not reported.
    prepare: `prepare(options)` is called when a model is loaded with these options: what cannot work is refused then.
    merge: `merge(operator's options, request's options)` -> options: for what a request may add to but never replace.
    """

    name: str
    help: str
    options: type[BaseModel] | str | None = None
    inline: bool = False
    phase: Literal["fuse", "bias", "mask"] | None = None
    logits_stage: str | None = None
    stream_stage: str | None = None
    weights_stage: str | None = None
    runner: str | None = None
    resolver: str | None = None
    commands: str | None = None
    routes: str | None = None
    conflicts: tuple[tuple[str, str], ...] = ()
    parse: str | None = None
    prompt_stage: str | None = None
    prompt_ids: str | None = None
    stream_order: int = 0
    prepare: str | None = None
    merge: str | None = None
    flags: tuple[Flag, ...] = ()

    def options_model(self) -> type[BaseModel] | None:
        return load_attribute(self.options) if isinstance(self.options, str) else self.options


def load_attribute(path: str) -> Any:
    """ "package.module:attribute" -> the attribute."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)
