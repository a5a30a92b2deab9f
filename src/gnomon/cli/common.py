"""What several commands share: capability flags, opening the model that the settings name, JSON output, tables."""

from __future__ import annotations

import inspect
import json
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from gnomon.capability import Flag
    from gnomon.config import Settings
    from gnomon.model import Model
    from gnomon.models.checkpoint import Checkpoint

ENGINE_KEYS = ("kv_memory", "max_sequences", "token_budget", "max_context", "speculation")
Parameter = inspect.Parameter


def command(run: Callable[..., None], parameters: Sequence[Parameter], help: str) -> typer.Typer:
    """A command whose parameters are known when it is loaded: capabilities bring theirs. run gets them by name."""

    def callback(**values: Any) -> None:
        run(**values)

    callback.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    app = typer.Typer(add_completion=False, rich_markup_mode=None)
    app.command(help=inspect.cleandoc(help), context_settings={"max_content_width": 100})(callback)
    return app


def option(name: str, kind: Any, help: str, *spellings: str, default: Any = None, **more: Any) -> Parameter:
    """One flag. spellings: without any, --name."""
    names = spellings or ("--" + name.replace("_", "-"),)
    info = typer.Option(default, *names, help=help, show_default=False, **more)
    return Parameter(name, Parameter.KEYWORD_ONLY, default=info, annotation=kind)


def argument(name: str, help: str) -> Parameter:
    """One optional positional argument."""
    info = typer.Argument(None, help=help, show_default=False, metavar=name.upper())
    return Parameter(name, Parameter.KEYWORD_ONLY, default=info, annotation=str | None)


def loading_options() -> list[Parameter]:
    """Flags that say how a model is opened."""
    return [
        option("profile", str | None, "Numeric profile: fp32, bf16, int8 or gguf; default: by the weights."),
        option("threads", int | None, "CPU threads; default: the CPUs really available."),
        option("device", str | None, "Where it runs: cpu, or cuda (not run on real hardware yet: docs/gpu.md)."),
        option("determinism", str | None, "For networks that are not gnomon's own: exact (refuse), verified or fast."),
        option("speculation", str | None, "Where drafts come from: lookup (default), draft, draft:REF or off."),
        option("chat_template", str | None, "A Jinja chat template file, in place of the model's own."),
    ]


def capability_flags(*, leave_out: Sequence[str] = ()) -> list[Parameter]:
    """One flag per option field of each inline capability, and `--NAME VALUE` for every other one."""
    from gnomon.registry import Registry

    registry = Registry.installed()
    flags = [_flag(name, info) for name, (_, info) in registry.inline_fields().items() if name not in leave_out]
    for capability in registry.capabilities.values():
        if not capability.inline and capability.options is not None:
            flags.append(option(capability.name, str | None, f"{capability.help} (JSON, @file or short form)"))
        flags += [option(flag.name, str | None, flag.help) for flag in capability.flags]
    return flags


def _flag(name: str, info: Any) -> Parameter:
    kind, many = _kind(info.annotation)
    spelled = "--" + name.replace("_", "-")
    names = (spelled, "-t") if name == "temperature" else (spelled,)
    if kind is bool:
        return option(name, bool | None, info.description or "", spelled)
    annotation: Any = (list[kind] if many else kind) | None  # type: ignore[valid-type]
    return option(name, annotation, info.description or "", *names)


def _kind(annotation: Any) -> tuple[Any, bool]:
    """A pydantic annotation as a flag's type, and whether the flag may be repeated."""
    origin = typing.get_origin(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(annotation) if option is not type(None)]
        return _kind(inner[0])
    if origin is list:
        return _kind(typing.get_args(annotation)[0])[0], True
    if annotation in (int, float, bool):
        return annotation, False
    return str, False


def given_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """The capability options among a command's values, parsed from their command-line forms."""
    from gnomon.registry import Registry

    registry = Registry.installed()
    keys = set(registry.keys())
    options: dict[str, Any] = {}
    for name, value in values.items():
        if name not in keys or value is None or value == []:
            continue
        if isinstance(value, str) and (name in registry.capabilities or value[:1] in "{["):
            value = registry.parse_text(name, value) if name in registry.capabilities else json_value(name, value)
        options[name] = value
    for capability in registry.capabilities.values():
        for flag in capability.flags:
            if isinstance(text := values.get(flag.name), str):
                options[capability.name] = _joined(options.get(capability.name), flag, text)
    return options


def option_keys(options: Mapping[str, Any]) -> dict[str, Any]:
    """Capability options by their dotted recipe keys."""
    from gnomon.sampling.options import SamplingOptions

    own = SamplingOptions.model_fields
    return {f"sampling.{name}" if name in own else name: value for name, value in options.items()}


def _joined(given: Any, flag: Flag, text: str) -> Any:
    """A flag's options together with those that the capability's own flag gave."""
    from gnomon.capability import load_attribute
    from gnomon.errors import UsageError

    if given is not None and not isinstance(given, dict):
        raise UsageError(f"--{flag.name} cannot be joined with what was given before.", param=flag.name)
    return {**(given or {}), **load_attribute(flag.parse)(text)}


def json_value(name: str, text: str) -> Any:
    from gnomon.errors import UsageError

    try:
        return json.loads(text)
    except ValueError as error:
        raise UsageError(f"--{name}: not valid JSON: {error}.", param=name) from None


def merged_settings(ref: str | None, values: Mapping[str, Any], **more: Any) -> Settings:
    """All sources merged; a recipe given as REF stands in for ./gnomon.yaml."""
    from gnomon.config import settings

    recipe = Path(ref) if ref is not None and ref.endswith((".yaml", ".yml")) and _is_recipe(Path(ref)) else None
    flags = {key: values.get(key) for key in ("profile", "threads", "device", "determinism", "chat_template")}
    flags["engine.speculation"] = values.get("speculation")
    if ref is not None and recipe is None:
        flags["model"] = ref
    return settings({**flags, **more}, recipe)


def _is_recipe(path: Path) -> bool:
    from gnomon.recipe import read_yaml

    content = read_yaml(path)
    return not isinstance(content, dict) or "gnomon" in content or "model" in content


def open_model(settings: Settings, ref: str | None = None) -> Model:
    """The model that the settings name (or another reference, opened the same way)."""
    from gnomon.loading import load
    from gnomon.recipe import read_template

    recipe = settings.recipe
    options = dict(settings.options)
    opened_from_recipe = ref is None
    if ref is None and recipe.model is None and (options.get("ensemble") or {}).get("members"):
        from gnomon.ensemble.resolving import reference_of

        place = Path(settings.origins.get("ensemble.members", "."))
        ref = reference_of(options.pop("ensemble"), place.parent if place.is_file() else Path())
    template = read_template(Path(recipe.chat_template)) if recipe.chat_template else None
    model = load(
        ref or recipe.model or _merge_of(settings),
        profile=recipe.profile,
        threads=recipe.threads,
        device=recipe.device,
        determinism=recipe.determinism,
        chat_template=template,
        defaults=options,
        **{key: getattr(recipe.engine, key) for key in ENGINE_KEYS},
    )
    if recipe.name and opened_from_recipe:
        model.name = recipe.name
    return model


def _merge_of(settings: Settings) -> Checkpoint | None:
    """The merge that stands in a recipe in place of a model; its paths start where the recipe lies."""
    if settings.recipe.merge is None:
        return None
    from gnomon.merge.build import open_merge

    place = Path(settings.origins.get("merge", "."))
    return open_merge(settings.recipe.merge, folder=place.parent if place.is_file() else Path())


def print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A table for people: rich on a terminal, tab-separated when piped."""
    if not sys.stdout.isatty():
        for row in rows:
            print("\t".join("" if cell is None else str(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*("" if cell is None else str(cell) for cell in row))
    Console().print(table)


def read_prompt(text: str | None) -> str:
    """A prompt argument, or standard input for `-` (and when nothing is given and input is piped)."""
    from gnomon.errors import PromptError

    if text not in (None, "-"):
        if text == "":
            raise PromptError("The prompt is empty.", hint="Give a text, or - to read standard input.")
        return str(text)
    if text is None and sys.stdin.isatty():
        raise PromptError("No prompt given.", hint='Try: gnomon generate "The capital of France is"')
    raw = sys.stdin.buffer.read()
    try:
        prompt = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PromptError(f"Standard input is not valid UTF-8 at byte {error.start}.") from None
    if not prompt.strip():
        raise PromptError("Standard input is empty.")
    return prompt


def human_bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
