"""The registry by which a room joins the command, the recipe, the request and the server.

A room registers ONE `Capability` under the entry-point group `gnomon.capabilities`; nothing above or below is edited.
Its options are parsed once, here, whether they came as `model.generate(...)` keywords, recipe keys, request fields or
command-line flags. Knows the protocols of stages, nothing of what any stage does, and imports no room.
"""

from __future__ import annotations

import difflib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from gnomon.errors import ConfigError, Conflict, NotAllowedInRequest, UnknownOption, UsageError

if TYPE_CHECKING:
    from pydantic import BaseModel
    from torch import Tensor

    from gnomon.engine.request import TokenEvent
    from gnomon.generation import Outcome
    from gnomon.models.tokenizer import Tokenizer

GROUP = "gnomon.capabilities"
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


class LogitsStage(Protocol):
    """Sees the logits of its request before sampling; one object per request and choice."""

    def process(self, logits_V: Tensor, generated: Sequence[int]) -> Tensor:
        """Return the logits to use: may edit in place; a masked token is -inf."""

    def accept(self, token_id: int) -> None:
        """This token was sampled."""

    def rollback(self, count: int) -> None:
        """The last `count` accepted tokens were taken back."""

    def copy(self) -> LogitsStage:
        """An independent twin in the same state."""


@dataclass(frozen=True)
class Ruling:
    """What a TokenGate says of the latest token.

    rollback: take back so many tokens, the latest included. hold: so many of the latest tokens may still be taken back,
    and give no text yet. finish: end here, for this reason.
    """

    rollback: int = 0
    hold: int = 0
    finish: Literal["stop", "length"] | None = None


@runtime_checkable
class TokenGate(Protocol):
    """A logits stage that also judges what was drawn, before any of it becomes text."""

    def judge(self, event: TokenEvent) -> Ruling:
        """The stage has accepted this token already."""

    def note(self) -> Mapping[str, Any]:
        """What is worth knowing of the latest token, by capability, for those who ask for log-probabilities."""

    def outcome(self, text: str, tokens: int, *, cut: bool) -> Outcome:
        """The text as it left, with so many tokens; cut: something else ended it, perhaps in the middle."""


@dataclass(frozen=True)
class Released:
    """What a StreamStage lets out.

    settled: how many more characters of its input are decided (let out, replaced or dropped); None: len(text).
    cut: where, in all the text it was given so far, everything ends; None: it goes on.
    hidden: spans of all the text it was given that were replaced: their tokens are reported nowhere.
    back_to: an end of a token, told by `token_ends_at`: the tokens after it are taken back, and others drawn instead.
    """

    text: str = ""
    settled: int | None = None
    cut: int | None = None
    reason: Literal["stop", "content_filter"] = "stop"
    findings: tuple[Mapping[str, Any], ...] = ()
    hidden: tuple[tuple[int, int], ...] = ()
    back_to: int | None = None


class PromptStage(Protocol):
    """Sees a prompt's texts before they become tokens; may change them, or raise Blocked.

    One with an attribute `roles` (a set of roles) sees only the messages of these.
    """

    def check(self, text: str) -> str:
        """One text: a raw prompt, or what one message says."""


class StreamStage(Protocol):
    """Sees canonical text in order; releases, holds, replaces or ends it. Depends on the text, never on the split.

    It must not block. One with an attribute `waits` that is true may wait in `finish`, which is then called on a thread
    of its own. One with an attribute `goes_back` that is true stands last, is told where tokens end
    (`token_ends_at(place)`, before their text) and begins anew with the text that stays (`go_back(text)`).
    """

    def push(self, text: str) -> Released:
        """More text arrived."""

    def finish(self) -> Released:
        """No more text comes: let out or drop what is held."""


@dataclass(frozen=True)
class StageContext:
    """What a stage may use. open_model: a function that opens another model the operator named.

    memory: what the stages of one prompt share. `private_prompt` there keeps the prompt out of the ledger.
    host: the Model whose prompt it is.
    """

    tokenizer: Tokenizer
    model: str
    seed: int
    open_model: Callable[[str], Any]
    memory: dict[str, Any] = field(default_factory=dict)
    host: Any = None
    max_tokens: int = 0
    temperature: float = 0.0


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
    merge: str | None = None
    flags: tuple[Flag, ...] = ()

    def options_model(self) -> type[BaseModel] | None:
        return load_attribute(self.options) if isinstance(self.options, str) else self.options


def load_attribute(path: str) -> Any:
    """ "package.module:attribute" -> the attribute."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


@dataclass
class Stages:
    """The stages of one request, in acting order."""

    fuse: list[LogitsStage] = field(default_factory=list)
    bias: list[LogitsStage] = field(default_factory=list)
    mask: list[LogitsStage] = field(default_factory=list)
    stream: list[StreamStage] = field(default_factory=list)


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
    shown = repr(first.get("input"))
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    if first["type"] == "extra_forbidden":
        return UnknownOption(f"Unknown key `{path}`.", param=path)
    return UsageError(f"`{path}`: {first['msg'].removeprefix('Value error, ')} (given {shown}).", param=path)


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
