"""Patches beside a model's weights: the option `patches`, which names them. What was loaded stands in table.py."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

from gnomon.capability import Capability
from gnomon.stages import StageContext

MOST_PATCHES = 16

PATCHES = Capability(
    name="patches",
    help="Patches that run beside the weights, for this request alone.",
    options="gnomon.patches:PatchOptions",
    inline=True,
    weights_stage="gnomon.patches:chosen",
    routes="gnomon.serve.patches:router",
)


class PatchOptions(BaseModel):
    """Which patches, in order."""

    model_config = ConfigDict(extra="forbid")

    patches: Annotated[
        list[str],
        Field(
            max_length=MOST_PATCHES,
            description="Patches to run beside the weights, in order: names that were loaded; for the operator also "
            "patch files and PEFT LoRA directories.",
        ),
    ] = []

    @field_validator("patches", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return [value] if isinstance(value, str) else value


def chosen(options: PatchOptions, context: StageContext) -> list[str]:
    """The weights stage: the patches of this request."""
    return options.patches
