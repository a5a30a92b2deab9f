"""Methods by name: one file each, registered by `@edit_method`, their options a pydantic model.

A method takes an Editor, facts and its options, and gives a Change. Third parties register theirs by the same
decorator and name the module in the entry-point group `gnomon.edit_methods`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.named import Named, NamedTable, first_line

if TYPE_CHECKING:
    from torch import Tensor

    from gnomon.edit.editor import Editor
    from gnomon.edit.facts import Fact
    from gnomon.models.patch import Delta, Wrapper

BUILT_IN = (
    *("rome", "memit", "emmet", "alphaedit", "encore", "finetune", "lora", "neurons"),
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
class Method(Named):
    """One registered method.

    on: what it changes. answers: the model is to say the target afterwards; otherwise the target says what a prompt
    stands for, and facts need no subject.
    """

    run: Run
    answers: bool
    on: Acts


_TABLE = NamedTable[Method](
    "edit method", [f"gnomon.edit.methods.{name}" for name in BUILT_IN], group="gnomon.edit_methods", param="method"
)


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
        _TABLE.add(Method(name, first_line(run), paper, options, experimental, run, answers, on))
        return run

    return register


def methods() -> dict[str, Method]:
    """All methods, by name; imports their files."""
    return _TABLE.all()


def method(name: str) -> Method:
    """Raises UsageError with the nearest name."""
    return _TABLE.named(name)
