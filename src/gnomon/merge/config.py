"""A merge file: mergekit's YAML (0.1.5), unchanged, checked key by key.

Knows the grammar, not what methods do with it: `plan.py` joins it with models and methods.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gnomon.capability import OPERATOR_ONLY
from gnomon.errors import ConfigError, MergeError, UnknownOption
from gnomon.merge.registry import find_method, suggest
from gnomon.merge.settings import Setting
from gnomon.registry import option_error

DTYPES = ("float32", "float16", "bfloat16", "float64", "int64")
Reference = Annotated[str, OPERATOR_ONLY]
Parameters = dict[str, Any]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @field_validator("model", "base_model", mode="before", check_fields=False)
    @classmethod
    def _reference(cls, value: Any) -> Any:
        return reference_text(value)

    @field_validator("parameters", check_fields=False)
    @classmethod
    def _settings(cls, value: Parameters) -> Parameters:
        for name, setting in value.items():
            Setting.parse(setting, f"parameters.{name}")
        return value


class Input(_Part):
    """One model of `models`."""

    model: Reference
    parameters: Parameters = {}
    data: Annotated[str | None, OPERATOR_ONLY, Field(description="Its own text, for methods that look at data.")] = None


class SliceSource(_Part):
    """A run of one model's layers."""

    model: Reference
    layer_range: Annotated[tuple[int, int], Field(description="[start, end), end not included.")]
    parameters: Parameters = {}

    @field_validator("layer_range")
    @classmethod
    def _is_a_run(cls, value: tuple[int, int]) -> tuple[int, int]:
        if not 0 <= value[0] < value[1]:
            raise ValueError(f"[{value[0]}, {value[1]}] is no run of layers: 0 <= start < end")
        return value


class Slice(_Part):
    """Layers of the output, merged from equally long runs."""

    sources: Annotated[list[SliceSource], Field(min_length=1)]
    base_model: Reference | None = None
    residual_weight: float | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _equally_long(self) -> Slice:
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"all sources of a slice must span the same number of layers, not {lengths}")
        return self


class Module(_Part):
    """One part of a network of several (text, vision, encoder, decoder)."""

    models: list[Input] | None = None
    slices: list[Slice] | None = None
    parameters: Parameters = {}

    @model_validator(mode="after")
    def _one_of(self) -> Module:
        if (self.models is None) == (self.slices is None):
            raise ValueError("exactly one of models and slices")
        return self


class TokenSource(_Part):
    """Where a token's embedding comes from, by more than a model's name."""

    kind: Literal["model_token", "zero"]
    model: Reference | None = None
    token: str | None = None
    token_id: int | None = None


class TokenRule(_Part):
    """What to do with one token."""

    source: TokenSource | Reference
    force: bool = False


class TokenizerOptions(_Part):
    """How the vocabularies are joined."""

    source: Reference = "union"
    tokens: dict[str, TokenRule] = {}
    pad_to_multiple_of: Annotated[int | None, Field(gt=0)] = None
    merges: Annotated[bool, Field(description="With union: join the BPE merges, not only the tokens.")] = False

    @field_validator("source", mode="before")
    @classmethod
    def _source(cls, value: Any) -> Any:
        return reference_text(value)


class MergeOptions(_Part):
    """A whole merge file (one document of it)."""

    merge_method: Annotated[str, Field(description="One of gnomon merge methods.")]
    models: list[Input] | None = None
    slices: list[Slice] | None = None
    modules: dict[str, Module] | None = None
    base_model: Reference | None = None
    parameters: Parameters = {}
    data: Annotated[str | None, OPERATOR_ONLY, Field(description="A text file, for methods that look at data.")] = None
    data_tokens: Annotated[int, Field(gt=1, description="How many tokens of it are read.")] = 20_000
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: Reference | None = None
    tokenizer: TokenizerOptions | None = None
    chat_template: str | None = None
    name: Annotated[str | None, Field(description="In a file of several documents: what later ones call it.")] = None

    @field_validator("merge_method")
    @classmethod
    def _known(cls, value: str) -> str:
        return find_method(value).name

    @field_validator("dtype", "out_dtype")
    @classmethod
    def _dtype(cls, value: str | None) -> str | None:
        name = value.removeprefix("torch.") if value else None
        if name is not None and name not in DTYPES:
            raise ValueError(suggest(name, DTYPES))
        return name

    @field_validator("tokenizer_source", mode="before")
    @classmethod
    def _source(cls, value: Any) -> Any:
        return reference_text(value)

    @model_validator(mode="after")
    def _consistent(self) -> MergeOptions:
        given = [key for key in ("models", "slices", "modules") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"exactly one of models, slices and modules (given: {', '.join(given) or 'none'})")
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source exclude each other")
        if self.chat_template and self.chat_template not in TEMPLATES and not _is_template(self.chat_template):
            hint = suggest(self.chat_template, TEMPLATES)
            raise ValueError(
                f"`chat_template: {self.chat_template}` is neither a known name nor a Jinja text. {hint.rstrip('.')}"
            )
        return self

    def merged_references(self) -> list[str]:
        """The models that are merged (base included), in the order of the document, the base first."""
        found = [self.base_model] if self.base_model else []
        parts: list[MergeOptions | Module] = [self, *(self.modules or {}).values()]
        for part in parts:
            found += [entry.model for entry in part.models or []]
            for piece in part.slices or []:
                found += [source.model for source in piece.sources] + ([piece.base_model] if piece.base_model else [])
        return list(dict.fromkeys(found))

    def references(self) -> list[str]:
        """Every model the file names, those that only give tokens included."""
        found, options = self.merged_references(), self.tokenizer
        sources = [self.tokenizer_source, options.source if options else None]
        found += [source for source in sources if source and source not in ("union", "base")]
        for rule in options.tokens.values() if options else ():
            named = rule.source.model if isinstance(rule.source, TokenSource) else rule.source
            found += [named] if named else []
        return list(dict.fromkeys(found))


TEMPLATES = ("auto", "alpaca", "chatml", "llama3", "mistral", "exaone")


def _is_template(text: str) -> bool:
    return len(text) >= 20 and "{" in text


def reference_text(value: Any) -> Any:
    """mergekit's object form of a model reference as its text form."""
    if not isinstance(value, dict):
        return value
    if unknown := set(value) - {"model", "path", "revision", "lora", "override_architecture"}:
        raise ValueError(f"unknown key `{sorted(unknown)[0]}` in a model reference")
    inner = value.get("model", value)
    path, revision = (inner, None) if isinstance(inner, str) else (inner.get("path"), inner.get("revision"))
    text = path + (f"@{revision}" if revision else "")
    return text + (f"+{reference_text(value['lora'])}" if value.get("lora") else "")


def is_merge_file(path: Path) -> bool:
    """Whether a YAML file's first document has `merge_method` at its top."""
    documents = read_documents(path)
    return bool(documents) and isinstance(documents[0], dict) and "merge_method" in documents[0]


def read_documents(path: Path) -> list[Any]:
    """All YAML documents of a file. Raises ConfigError with line and column."""
    try:
        return [d for d in yaml.safe_load_all(path.read_text(encoding="utf-8")) if d is not None]
    except FileNotFoundError:
        raise ConfigError(f"No file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {_yaml_fault(error)}.") from None


def _yaml_fault(error: yaml.YAMLError) -> str:
    """What is wrong, with line and column."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"{problem} in line {mark.line + 1}, column {mark.column + 1}"


_KINDS = {"str": "text", "list": "a list", "int": "a number", "float": "a number"}


def parse_config(content: Any, source: str = "merge") -> MergeOptions:
    """One document. Raises ConfigError naming source, key path and the nearest known key."""
    if isinstance(content, MergeOptions):
        return content
    if not isinstance(content, dict):
        kind = _KINDS.get(type(content).__name__, type(content).__name__)
        hint = "It begins with `merge_method:`."
        raise ConfigError(f"{source}: a merge is a mapping of keys, not {kind}.", hint=hint)
    if "experts" in content and "merge_method" not in content:
        raise ConfigError(f"{source} describes a mixture of experts.", hint="That is `gnomon merge moe FILE OUT`.")
    try:
        return MergeOptions.model_validate(content)
    except MergeError as error:
        raise MergeError(f"{source}: {error.message}", hint=error.hint, param=error.param) from None
    except ValidationError as error:
        first = option_error(error)
        if isinstance(first, UnknownOption):
            key = (first.param or "").split(".")[-1]
            hint = suggest(key, _keys_beside(error.errors()[0]["loc"]))
            raise ConfigError(f"{source}: unknown key `{first.param}`.", hint=hint, param=first.param) from None
        raise ConfigError(f"{source}: {first.message}", param=first.param) from None


def _keys_beside(location: tuple[int | str, ...]) -> list[str]:
    """The known keys where an unknown one was found."""
    names = [part for part in location[:-1] if isinstance(part, str)]
    homes: dict[str, type[BaseModel]] = {
        "models": Input, "sources": SliceSource, "slices": Slice, "modules": Module,
        "tokenizer": TokenizerOptions, "tokens": TokenRule,
    }  # fmt: skip
    home = next((homes[name] for name in reversed(names) if name in homes), MergeOptions)
    return list(home.model_fields)
