"""Request bodies in OpenAI's shape.

Each body names the fields its endpoint handles itself; every other field must be claimed by an installed capability
or is refused by name. A few fields change nothing here (bookkeeping of the hosted service): they are accepted and
named in the `x-gnomon-ignored` response header. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gnomon.errors import UsageError
from gnomon.registry import nearest, option_error

BOOKKEEPING = frozenset(
    ["metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"]
)
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "suffix": ("",),
    "functions": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
    "prediction": (),
    "audio": (),
    "reasoning_effort": ("none",),
}
"""OpenAI fields that no installed capability may claim yet: accepted only with a value that asks for nothing."""


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class _Body(BaseModel):
    """Fields that every generating endpoint handles; the rest stays in `extra_options()` for the registry."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: str = Field(min_length=1)
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    def extra_options(self) -> dict[str, Any]:
        return dict(self.__pydantic_extra__ or {})


class ChatBody(_Body):
    """POST /v1/chat/completions."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None


class CompletionBody(_Body):
    """POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=None, ge=1)
    response_format: dict[str, Any] | None = None


class EmbeddingBody(BaseModel):
    """POST /v1/embeddings."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str = Field(min_length=1)
    input: str | list[str]
    encoding_format: str = Field(default="float", pattern="^(float|base64)$")
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], content: Any) -> Body:
    """A JSON body as one of the kinds above. Raises UsageError with the field's path."""
    if not isinstance(content, dict):
        raise UsageError(f"The body must be a JSON object, not {type(content).__name__}.")
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        fault = option_error(error)
        if fault.code == "unknown_parameter":
            fault.hint = nearest(fault.param or "", kind.model_fields)
        raise fault from None


def split_options(extra: Mapping[str, Any], claimed: list[str]) -> tuple[dict[str, Any], list[str]]:
    """(options for the registry, names of fields that change nothing).

    A field that no capability claims is either bookkeeping, or harmless with the value given, or refused by name.
    """
    options: dict[str, Any] = {}
    ignored: list[str] = []
    for name, value in extra.items():
        if name in claimed or value is None:
            options[name] = value
        elif name in BOOKKEEPING:
            ignored.append(name)
        elif name in NEUTRAL:
            if value not in NEUTRAL[name]:
                raise UsageError(
                    f"`{name}` is not supported by this server (given {_short(value)}).",
                    hint="No installed capability handles it.",
                    param=name,
                )
            ignored.append(name)
        else:
            options[name] = value
    return {name: value for name, value in options.items() if value is not None}, ignored


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
