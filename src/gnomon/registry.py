"""The registry: every installed capability by name, and the one place where options are parsed.

Options are parsed once, here, whether they came as `model.generate(...)` keywords, recipe keys, request fields or
command-line flags. Knows the protocols of stages, nothing of what any stage does, and imports no room.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gnomon.capability import OPERATOR_ONLY, Capability, Origin, load_attribute
from gnomon.errors import ConfigError, Conflict, NotAllowedInRequest, UnknownOption, UsageError
from gnomon.stages import PromptStage, StageContext, Stages

if TYPE_CHECKING:
    from pydantic import BaseModel

GROUP = "gnomon.capabilities"


ParsedOptions = dict[str, "BaseModel"]


class Registry:
    """All capabilities that are installed, by name."""

    def __init__(self, capabilities: Iterable[Capability]) -> None:
        self.capabilities: dict[str, Capability] = {}
        for capability in sorted(capabilities, key=lambda c: c.name):
            if capability.name in self.capabilities:
                raise ConfigError(f"Two installed packages register the capability `{capability.name}`.")
            self.capabilities[capability.name] = capability

    @classmethod
    @cache
    def installed(cls) -> Registry:
        """From the entry points of all installed packages; read once per process."""
        return cls(point.load() for point in entry_points(group=GROUP))

    def inline_fields(self) -> dict[str, tuple[Capability, Any]]:
        """Top-level field name -> (capability, pydantic FieldInfo)."""
        fields: dict[str, tuple[Capability, Any]] = {}
        for capability in self.capabilities.values():
            model = capability.options_model() if capability.inline else None
            for name, info in (model.model_fields if model else {}).items():
                if name in fields:
                    raise ConfigError(
                        f"`{capability.name}` and `{fields[name][0].name}` both claim the field `{name}`."
                    )
                fields[name] = (capability, info)
        return fields

    def keys(self) -> list[str]:
        """Every key that `parse` accepts, sorted."""
        blocks = [c.name for c in self.capabilities.values() if not c.inline and c.options is not None]
        return sorted([*self.inline_fields(), *blocks])

    def parse(
        self, given: Mapping[str, Any], origin: Origin, defaults: Mapping[str, Any] | None = None
    ) -> ParsedOptions:
        """Validate options once. defaults: the operator's own (recipe, model card), overridden key by key.

        Raises UnknownOption with the nearest key, UsageError with the field's path, NotAllowedInRequest, Conflict.
        """
        inline = self.inline_fields()
        if origin is Origin.REQUEST:
            given = {key: value for key, value in given.items() if value is not None}  # null unsets nothing
            given, asked = self._merge_requested(given, defaults or {}), given
        values = {key: value for key, value in {**(defaults or {}), **given}.items() if value is not None}
        grouped: dict[str, Any] = {c.name: {} for c in self.capabilities.values() if c.inline and c.options}
        for key, value in values.items():
            if key in inline:
                grouped[inline[key][0].name][key] = value
            elif key in self.capabilities and self.capabilities[key].options is not None:
                grouped[key] = value
            else:
                raise UnknownOption(f"Unknown option `{key}`.", hint=nearest(key, self.keys()), param=key)
        parsed = {name: self._validate(self.capabilities[name], value) for name, value in grouped.items()}
        if origin is Origin.REQUEST:
            self._refuse_operator_only(asked, inline)
        self._refuse_conflicts([name for name in parsed if not self.capabilities[name].inline])
        return parsed

    def prepare(self, defaults: Mapping[str, Any]) -> None:
        """An operator's defaults at load: a wrong one is an error now, not at first use. Raises what `parse` does."""
        for name, options in self.parse({}, Origin.RECIPE, defaults).items():
            if prepare := self.capabilities[name].prepare:
                load_attribute(prepare)(options)

    def _merge_requested(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Where a capability says how, a request's block is merged into the operator's in place of replacing it."""
        merged = dict(given)
        for name, value in given.items():
            capability = self.capabilities.get(name)
            if capability is not None and capability.merge is not None and defaults.get(name) is not None:
                operator = self._validate(capability, defaults[name])
                merged[name] = load_attribute(capability.merge)(operator, self._validate(capability, value))
        return merged

    def _validate(self, capability: Capability, value: Any) -> BaseModel:
        from pydantic import BaseModel, ValidationError

        model = capability.options_model()
        if model is None:
            raise UnknownOption(f"`{capability.name}` takes no options.", param=capability.name)
        if isinstance(value, BaseModel) and isinstance(value, model):
            return value
        prefix = () if capability.inline else (capability.name,)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise option_error(error, prefix) from None

    def _refuse_operator_only(self, given: Mapping[str, Any], inline: Mapping[str, tuple[Capability, Any]]) -> None:
        for key, value in given.items():
            if value is None:
                continue
            if key in inline:
                if OPERATOR_ONLY in inline[key][1].metadata:
                    raise _operator_only(key)
            else:
                _walk_operator_only(self._validate(self.capabilities[key], value), key)

    def _refuse_conflicts(self, names: Sequence[str]) -> None:
        for name in names:
            for other, why in self.capabilities[name].conflicts:
                if other in names:
                    raise Conflict(f"`{name}` cannot be used together with `{other}`: {why}", param=name)

    def parse_text(self, name: str, text: str) -> Any:
        """A capability's options from a command-line string: JSON, `@file` (JSON or YAML), or its own short form."""
        if text.startswith("@"):
            return _read_options_file(Path(text[1:]), name)
        if text[:1] in "{[":
            try:
                return json.loads(text)
            except json.JSONDecodeError as error:
                raise UsageError(
                    f"--{name}: not valid JSON at character {error.pos}: {error.msg}.", param=name
                ) from None
        parse = self.capabilities[name].parse
        return load_attribute(parse)(text) if parse else text

    def patches(self, parsed: ParsedOptions, context: StageContext) -> list[str]:
        """The patches of this request: what every weights stage names, in the registry's order."""
        found: list[str] = []
        for name, options in parsed.items():
            if stage := self.capabilities[name].weights_stage:
                found += load_attribute(stage)(options, context)
        return found

    def weights_keys(self) -> set[str]:
        """The options that only say which patches to wear: a run that names its patches needs none of them."""
        return {name for name, capability in self.capabilities.items() if capability.weights_stage}

    def stages(self, parsed: ParsedOptions, context: StageContext) -> Stages:
        """Build this request's stages in the registry's declared order: by phase and stream_order, then by name."""
        stages = Stages()
        for name, options in sorted(parsed.items(), key=lambda item: self.capabilities[item[0]].stream_order):
            capability = self.capabilities[name]
            if capability.logits_stage and (stage := load_attribute(capability.logits_stage)(options, context)):
                getattr(stages, capability.phase or "bias").append(stage)
            if capability.stream_stage and (stage := load_attribute(capability.stream_stage)(options, context)):
                stages.stream.append(stage)
        return stages

    def prompt_ids(self, parsed: ParsedOptions, ids: list[int], context: StageContext) -> list[int]:
        """A raw prompt's token ids, as those capabilities want them that look at its end."""
        for name, options in parsed.items():
            if trim := self.capabilities[name].prompt_ids:
                ids = load_attribute(trim)(options, ids, context)
        return ids

    def prompt_stages(self, parsed: ParsedOptions, context: StageContext) -> list[PromptStage]:
        """What looks at this prompt before it becomes tokens, in the order of the stream stages."""
        ordered = sorted(parsed.items(), key=lambda item: (self.capabilities[item[0]].stream_order, item[0]))
        built = (
            load_attribute(capability.prompt_stage)(options, context)
            for name, options in ordered
            if (capability := self.capabilities[name]).prompt_stage
        )
        return [stage for stage in built if stage is not None]


def nearest(key: str, known: Iterable[str]) -> str:
    """A hint for an unknown key: the nearest known one, or the whole list when nothing is near."""
    names = sorted(known)
    close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
    return f"Did you mean `{close[0]}`?" if close else f"Known: {', '.join(names)}."


def option_error(error: Any, prefix: tuple[str, ...] = ()) -> UsageError:
    """A pydantic ValidationError as one of ours: first fault, its path, what was given."""
    first = error.errors()[0]
    path = ".".join(str(part) for part in (*prefix, *first["loc"]) if not str(part).startswith("function-"))
    given, shown = first.get("input"), repr(first.get("input"))
    shown = "" if isinstance(given, Mapping) else f" (given {shown if len(shown) <= 60 else shown[:57] + '...'})"
    if first["type"] == "extra_forbidden":
        return UnknownOption(f"Unknown key `{path}`.", param=path)
    place = f"`{path}`: " if path else ""
    return UsageError(f"{place}{first['msg'].removeprefix('Value error, ')}{shown}.", param=path)


def _operator_only(path: str) -> NotAllowedInRequest:
    return NotAllowedInRequest(
        f"`{path}` may not be set in a request: it names a file, code, a model or a URL.",
        hint="The operator sets it in the recipe or on the command line.",
        param=path,
    )


def _walk_operator_only(value: Any, path: str) -> None:
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        for name in value.model_fields_set:
            info = type(value).model_fields.get(name)
            if info is not None and OPERATOR_ONLY in info.metadata:
                raise _operator_only(f"{path}.{name}")
            _walk_operator_only(getattr(value, name), f"{path}.{name}")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _walk_operator_only(item, f"{path}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _walk_operator_only(item, f"{path}[{index}]")


def _read_options_file(path: Path, name: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--{name} @{path}: {error}", param=name) from error
