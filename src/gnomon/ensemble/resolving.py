"""References that mean an ensemble: a recipe with `ensemble:`, GaC's YAML, "a+b", and "ensemble:{...}" (the ledger's).

In a recipe `ensemble.members` stands in place of `model`. Files of GaC are read unmodified. "a+b" is an ensemble when
every part names a model; a part that is a LoRA directory makes it an overlay, as everywhere else.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from gnomon.capability import Resolved
from gnomon.ensemble.gac import from_gac, is_gac
from gnomon.ensemble.options import EnsembleOptions, MemberOptions
from gnomon.errors import ConfigError, GnomonError, UsageError
from gnomon.loading import LoadSettings
from gnomon.models.reference import Reference
from gnomon.registry import Registry, nearest

SUFFIXES = (".yaml", ".yml")


def resolve(ref: str | Path) -> Resolved | None:
    """Resolver hook of the capability."""
    text = str(ref)
    if text.startswith("ensemble:"):
        try:
            content = json.loads(text.removeprefix("ensemble:"))
        except ValueError as error:
            raise UsageError(f"`ensemble:` is followed by no JSON: {error}.", param="model") from None
        return _resolved(content, Path())
    path = Path(text)
    if path.suffix in SUFFIXES and path.is_file():
        return _from_file(path)
    if "+" in text and not path.exists() and (parts := _models(text)) is not None:
        return _resolved({"members": parts}, Path())
    return None


def opened(content: Mapping[str, Any], folder: Path, settings: LoadSettings, name: str | None = None) -> Any:
    """The ensemble that options describe; relative paths in them are relative to `folder`."""
    from gnomon.ensemble.ensemble import Ensemble
    from gnomon.ensemble.opening import check_options

    options: EnsembleOptions = check_options(content)
    if not options.members:
        raise UsageError("An ensemble needs members.", hint="Name models.", param="ensemble.members")
    members = [_member(entry, folder) for entry in options.members]
    said = {key: getattr(options, key) for key in options.model_fields_set - {"members"}}
    return Ensemble(
        members,
        name=name,
        profile=settings.profile,
        threads=settings.threads,
        kv_memory=settings.kv_memory,
        max_sequences=settings.max_sequences,
        token_budget=settings.token_budget,
        max_context=settings.max_context,
        defaults=settings.defaults,
        ledger=settings.ledger,
        **said,
    )


def reference_of(block: Mapping[str, Any], folder: Path) -> str:
    """An `ensemble:` block as a reference, its relative paths made relative to here."""
    members: list[Any] = []
    for entry in block["members"]:
        if isinstance(entry, str):
            members.append(_relative(entry, folder))
        else:
            paths = {"model": _relative(entry["model"], folder)}
            if entry.get("chat_template"):
                paths["chat_template"] = str(folder / entry["chat_template"])
            members.append({**{key: value for key, value in entry.items() if value is not None}, **paths})
    return "ensemble:" + json.dumps({**block, "members": members}, sort_keys=True)


def opened_file(path: str, said: Mapping[str, Any], profile: str | None, threads: int | None) -> Any:
    """The ensemble of a recipe or GaC file, with some options said anew."""
    found = _from_file(Path(path), said)
    if found is None or found.open is None:
        raise ConfigError(f"{path} names no ensemble.", hint="It needs `ensemble: {members: [...]}`.", param="ensemble")
    return found.open(LoadSettings(profile=profile, threads=threads))


def _resolved(
    content: Mapping[str, Any],
    folder: Path,
    defaults: Mapping[str, Any] | None = None,
    loading: Mapping[str, Any] | None = None,
) -> Resolved:
    def build(settings: LoadSettings) -> Any:
        merged = {**(defaults or {}), **(settings.defaults or {})}
        merged.pop("ensemble", None)  # said once: it made the members
        if settings.chat_template is not None:
            raise UsageError(
                "An ensemble has no chat template of its own.",
                hint="Give each member its own: `chat_template` beside its `model`.",
                param="chat_template",
            )
        plain = LoadSettings(**{**settings.__dict__, "defaults": merged})
        return opened(content, folder, plain)

    return Resolved(None, dict(defaults or {}), build, dict(loading or {}))


def _from_file(path: Path, said: Mapping[str, Any] | None = None) -> Resolved | None:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # the recipe's own reader says what is wrong with it
    if not isinstance(content, Mapping):
        return None
    if is_gac(content):
        return _resolved({**from_gac(content, str(path)), **(said or {})}, path.parent)
    block = content.get("ensemble")
    if not isinstance(block, Mapping) or not block.get("members"):
        return None
    if content.get("model") is not None:
        raise ConfigError(
            f"{path}: both `model` and `ensemble.members` name models.", hint="Keep one of them.", param="model"
        )
    own = {
        "gnomon",
        "name",
        "model",
        "profile",
        "threads",
        "device",
        "determinism",
        "chat_template",
        "engine",
        "serve",
        "sampling",
    }
    inline = set(Registry.installed().keys())
    if unknown := sorted(set(content) - own - inline):
        raise ConfigError(
            f"{path}: unknown key `{unknown[0]}`.", hint=nearest(unknown[0], own | inline), param=str(unknown[0])
        )
    defaults = {key: value for key, value in content.items() if key in inline and key != "ensemble"}
    defaults |= content.get("sampling") or {}
    defaults.pop("sampling", None)
    loading = {key: content[key] for key in ("profile", "threads") if content.get(key) is not None}
    loading |= content.get("engine") or {}
    return _resolved({**block, **(said or {})}, path.parent, defaults, loading)


def _models(text: str) -> list[str] | None:
    """The parts of "a+b" when each is a model of its own; None when some is an adapter or unknown."""
    parts = text.split("+")
    for part in parts:
        try:
            reference = Reference.parse(part)
        except GnomonError:
            return None
        place = Path(reference.location)
        if reference.kind == "directory" and not (place / "config.json").exists():
            return None  # an adapter
        if reference.kind == "gguf" and place.suffix != ".gguf":
            return None  # a patch file
    return parts


def _member(entry: str | MemberOptions, folder: Path) -> str | MemberOptions:
    if isinstance(entry, str):
        return _relative(entry, folder)
    template = entry.chat_template and str(folder / entry.chat_template)
    return entry.model_copy(update={"model": _relative(entry.model, folder), "chat_template": template})


def _relative(model: str, folder: Path) -> str:
    return str(folder / model) if model.startswith(("./", "../")) else model


def members_of(ref: str) -> tuple[list[str | MemberOptions], list[float]]:
    """The members of a reference and their normalised votes; a model that is no ensemble is its own only member."""
    from gnomon.ensemble.fusion import normalised
    from gnomon.ensemble.opening import check_options

    content, folder = _content(ref)
    if content is None:
        return [ref], [1.0]
    options = check_options(content)
    members = [_member(entry, folder) for entry in options.members or []]
    beside = [1.0 if isinstance(m, str) or m.weight is None else m.weight for m in members]
    return members, normalised(options.weights or beside, len(members))


def _content(ref: str) -> tuple[Mapping[str, Any] | None, Path]:
    """The ensemble options that a reference stands for; None when it is a single model."""
    path = Path(ref)
    if ref.startswith("ensemble:"):
        return json.loads(ref.removeprefix("ensemble:")), Path()
    if path.suffix in SUFFIXES and path.is_file():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        if isinstance(content, Mapping):
            if is_gac(content):
                return from_gac(content, ref), path.parent
            if isinstance(content.get("ensemble"), Mapping):
                return content["ensemble"], path.parent
        return None, Path()
    if "+" in ref and not path.exists() and (parts := _models(ref)) is not None:
        return {"members": parts}, Path()
    return None, Path()
