"""Methods by name: one file each, registered by `@edit_method`, their options a pydantic model.

A method takes an Editor, facts and its options, and gives a Change. Third parties register theirs by the same
decorator and name the module in the entry-point group `gnomon.edit_methods`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gnomon.errors import UnknownOption, UsageError
from gnomon.registry import nearest, option_error

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.edit.editor import Editor
    from gnomon.edit.facts import Fact
    from gnomon.models.patch import Delta, Wrapper

GROUP = "gnomon.edit_methods"
BUILT_IN = (
    *("rome", "memit", "emmet", "alphaedit", "encore", "finetune", "lora"),
    *("grace", "wise", "tpatcher", "calinet", "steer", "leace"),
)


class MethodOptions(BaseModel):
    """What every method understands."""

    model_config = ConfigDict(extra="forbid")

    layers: Annotated[list[int] | None, Field(description="Layers to edit; default: the model's profile.")] = None


class SearchOptions(MethodOptions):
    """The search for a value vector (see values.py)."""

    prefixes: Annotated[int, Field(ge=0, le=16, description="Prefixes put before the prompt.")] = 3
    frames: Annotated[int, Field(ge=0, le=8, description="Loose sentences about the subject seen as well.")] = 0
    chat: Annotated[bool, Field(description="See the fact through the chat template as well.")] = True
    steps: Annotated[int, Field(gt=0, description="Most gradient steps.")] = 15
    rate: Annotated[float, Field(gt=0, description="Learning rate of the search (Adam).")] = 0.5
    relative: Annotated[bool, Field(description="The rate counts in RMS of the unedited vector.")] = True
    clamp: Annotated[float, Field(gt=0, description="Longest change, in lengths of the unedited vector.")] = 4.0
    kl: Annotated[float, Field(ge=0, description="Weight of keeping what the subject is.")] = 0.0625
    decay: Annotated[float, Field(ge=0, description="Weight of a short change.")] = 1e-3
    stop: Annotated[float, Field(ge=0, description="Loss that is low enough.")] = 0.1
    ridge: Annotated[float, Field(ge=0, description="Added to C, as a share of its mean eigenvalue.")] = 1e-3


@dataclass(frozen=True)
class Change:
    """What a method found. deltas: by tensor name. notes: per fact. attachments: state to go on from. wrappers: what
    acts on activations.
    """

    deltas: Mapping[str, Delta]
    notes: list[dict[str, Any]] = field(default_factory=list)
    attachments: Mapping[str, Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Wrapper] = ()


Acts = Literal["weights", "activations"]
Run = Callable[["Editor", Sequence["Fact"], Any], Change]


@dataclass(frozen=True)
class Method:
    """One registered method. experimental: shown to work as a mechanism only, not measured at full size.

    on: what it changes. answers: the model is to say the target afterwards; otherwise the target says what a prompt
    stands for, and facts need no subject.
    """

    name: str
    help: str
    paper: str
    options: type[MethodOptions]
    run: Run
    experimental: bool = False
    answers: bool = True
    on: Acts = "weights"

    def parse(self, given: Mapping[str, Any]) -> MethodOptions:
        """Raises UnknownOption with the nearest option, UsageError with the field at fault."""
        try:
            return self.options.model_validate(dict(given))
        except ValidationError as error:
            found = option_error(error)
            if isinstance(found, UnknownOption):
                raise UnknownOption(
                    f"`{self.name}` has no option `{found.param}`.",
                    hint=nearest(found.param or "", self.options.model_fields),
                    param=found.param,
                ) from None
            raise found from None


_METHODS: dict[str, Method] = {}


def edit_method(
    name: str,
    options: type[MethodOptions],
    *,
    paper: str,
    experimental: bool = False,
    answers: bool = True,
    on: Acts = "weights",
) -> Callable[[Run], Run]:
    """Register `run(editor, facts, options) -> Change` under a name; its docstring's first line is the help."""

    def register(run: Run) -> Run:
        text = (run.__doc__ or "").strip().splitlines()
        _METHODS[name] = Method(name, text[0] if text else "", paper, options, run, experimental, answers, on)
        return run

    return register


def methods() -> dict[str, Method]:
    """All methods, by name; imports their files."""
    for module in BUILT_IN:
        importlib.import_module(f"gnomon.edit.methods.{module}")
    for point in entry_points(group=GROUP):
        point.load()
    return dict(sorted(_METHODS.items()))


def method(name: str) -> Method:
    """Raises UsageError with the nearest name."""
    known = methods()
    if name not in known:
        raise UsageError(f"There is no edit method `{name}`.", hint=nearest(name, known), param="method")
    return known[name]
