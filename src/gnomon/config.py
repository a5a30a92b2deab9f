"""Settings and where they came from: flags > GNOMON_* > ./gnomon.yaml > user config > defaults.

A configuration file is a recipe (docs/recipe.md); a setting is one of its keys, dotted (`serve.port`), and its
environment variable is that key in capitals (`GNOMON_SERVE_PORT`). Shared by the command line and the server.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from platformdirs import user_config_path
from pydantic import BaseModel

from gnomon.errors import ConfigError
from gnomon.recipe import Recipe, capability_options, check_recipe, placed, read_yaml, schema_model

LOCAL_FILE = Path("gnomon.yaml")


@dataclass(frozen=True)
class Setting:
    """One setting's value and origin, as `config show --origin` prints it."""

    key: str
    value: Any
    origin: str


def user_config_file() -> Path:
    """$GNOMON_CONFIG, or config.yaml in the user's configuration folder for gnomon."""
    given = os.environ.get("GNOMON_CONFIG")
    return Path(given) if given else user_config_path("gnomon") / "config.yaml"


@dataclass(frozen=True)
class Settings:
    """The merged configuration: `recipe` has the values, `origins` says where each given key came from."""

    recipe: Recipe
    origins: Mapping[str, str]

    @property
    def options(self) -> dict[str, Any]:
        """Capability options (sampling, stop, ...) as `Registry.parse` takes them."""
        return capability_options(self.recipe)

    def rows(self) -> list[Setting]:
        """Every known setting with its value and origin, in the schema's order."""
        given = flatten(self.recipe.model_dump(mode="json"))
        return [Setting(key, given.get(key), self.origins.get(key, "default")) for key in _leaf_keys(schema_model())]


def settings(flags: Mapping[str, Any] | None = None, recipe_file: Path | None = None) -> Settings:
    """Merge all sources. flags: dotted key -> value, None meaning not given. recipe_file stands in for ./gnomon.yaml.

    Raises ConfigError naming the source and key path of what is wrong.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    for source, content in [*_files(recipe_file), *_environment(), _flags(flags or {})]:
        if not content:
            continue
        check_recipe(content, source)
        flat = flatten(content)
        if flat.get("model") is not None and flat.get("merge") is not None:
            raise ConfigError(f"{source}: both `model` and `merge` are given.", hint="Give one of them.", param="model")
        for given, other in (("model", "merge"), ("merge", "model")):
            if flat.get(given) is not None:  # the nearest source says what the model is
                values.pop(other, None), origins.pop(other, None)
        for key, value in flat.items():
            values[key], origins[key] = value, source
    return Settings(check_recipe(unflatten(values), "the merged configuration"), origins)


def _files(recipe_file: Path | None) -> list[tuple[str, dict[str, Any]]]:
    local = recipe_file or LOCAL_FILE
    found = []
    for path in (user_config_file(), local):
        if path is recipe_file or path.is_file():
            content = read_yaml(path)
            if content is not None and not isinstance(content, dict):
                raise ConfigError(f"{path}: a configuration file is a mapping of keys.")
            found.append((str(path), placed(content or {}, path.parent)))
    return found


def _environment() -> list[tuple[str, dict[str, Any]]]:
    """GNOMON_SERVE_PORT=9000 -> serve.port. A value is YAML where the key is no plain string."""
    found = []
    for key in _leaf_keys(schema_model()):
        name = "GNOMON_" + key.replace(".", "_").upper()
        if name in os.environ:
            found.append((name, unflatten({key: _typed(os.environ[name])})))
    return found


def _flags(flags: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    return "command line", unflatten({key: value for key, value in flags.items() if value is not None})


def _typed(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def flatten(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"serve": {"port": 1}} -> {"serve.port": 1}; only blocks of known options are entered."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        path = f"{prefix}{key}"
        if isinstance(value, Mapping) and path in _block_keys(schema_model()):
            flat |= flatten(value, path + ".")
        else:
            flat[path] = value
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    content: dict[str, Any] = {}
    for path, value in flat.items():
        place = content
        *parents, last = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return content


def _model_of(annotation: Any) -> type[BaseModel] | None:
    for option in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(option, type) and issubclass(option, BaseModel):
            return option
    return None


def _leaf_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, info in model.model_fields.items():
        inner = _model_of(info.annotation)
        keys += _leaf_keys(inner, f"{prefix}{name}.") if inner else [prefix + name]
    return keys


def _block_keys(model: type[BaseModel]) -> set[str]:
    return {name for name, info in model.model_fields.items() if _model_of(info.annotation)}
