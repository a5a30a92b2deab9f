"""mergekit-moe's file: a base, experts with prompts, how the router is made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from gnomon.capability import OPERATOR_ONLY
from gnomon.errors import ConfigError, UnknownOption
from gnomon.merge.config import Reference, read_documents, reference_text
from gnomon.merge.registry import suggest
from gnomon.registry import option_error


class Expert(BaseModel):
    """One expert. noise_scale: deviation of the noise on its weights. residual_scale: of its down projection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source_model: Reference
    positive_prompts: list[str] = []
    negative_prompts: list[str] = []
    noise_scale: Annotated[float | None, Field(ge=0)] = None
    residual_scale: float | None = None

    @field_validator("source_model", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return reference_text(value)


class MoeOptions(BaseModel):
    """A whole file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base_model: Annotated[str, OPERATOR_ONLY]
    experts: Annotated[list[Expert], Field(min_length=1)]
    gate_mode: Literal["hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random"] = "hidden"
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    experts_per_token: Annotated[int, Field(gt=0)] = 2
    shared_experts: list[Expert] = []
    architecture: str | None = None

    @field_validator("base_model", mode="before")
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return reference_text(value)


def parse_moe(file: Path) -> MoeOptions:
    """Raises ConfigError naming the key and what is wrong with it."""
    documents = read_documents(file)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise ConfigError(f"{file} must be one mapping with base_model and experts.")
    content = documents[0]
    if content.get("shared_experts", 0) is None:
        content = {**content, "shared_experts": []}
    try:
        options = MoeOptions.model_validate(content)
    except ValidationError as error:
        first = option_error(error)
        hint = None
        if isinstance(first, UnknownOption):
            hint = suggest((first.param or "").split(".")[-1], {*MoeOptions.model_fields, *Expert.model_fields})
        raise ConfigError(f"{file}: {first.message}", hint=hint, param=first.param) from None
    if len(options.experts) < options.experts_per_token:
        raise ConfigError(
            f"{file}: experts_per_token is {options.experts_per_token}, and there are {len(options.experts)} experts.",
            param="experts_per_token",
        )
    if "random" not in options.gate_mode:
        prompts = [(tuple(e.positive_prompts), tuple(e.negative_prompts)) for e in options.experts]
        for number, (positive, _) in enumerate(prompts):
            if not positive:
                raise ConfigError(
                    f"{file}: experts[{number}] has no positive_prompts, which gate_mode {options.gate_mode} reads.",
                    hint="Give examples of what it should answer, or set gate_mode: random.",
                    param="positive_prompts",
                )
        if len(prompts) > 1 and len(set(prompts)) == 1:
            raise ConfigError(f"{file}: all experts have the same prompts; the router could not tell them apart.")
    return options
