"""The recipe: one YAML file (`gnomon.yaml`) that names a model and everything done to it.

Its own keys stand in `Recipe`; every installed capability adds its own. Unknown keys are refused with their path and
the nearest known one. Knows how to read and check, not how to run.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator

from gnomon.capability import Capability, Origin, Resolved
from gnomon.errors import ConfigError, UnknownOption, UsageError
from gnomon.registry import Registry, nearest, option_error

RECIPE = Capability(
    name="recipe",
    help="A YAML file as a model reference: the model it names, with its defaults.",
    resolver="gnomon.recipe:resolve",
)
SUFFIXES = (".yaml", ".yml")


class ServeOptions(BaseModel):
    """How `gnomon serve` listens."""

    model_config = ConfigDict(extra="forbid")

    host: Annotated[str, Field(description="Address to bind to.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port to bind to; 0 takes a free one.")] = 8000
    api_key: Annotated[str | None, Field(description="Clients must send it as `Authorization: Bearer KEY`.")] = None
    admin_key: Annotated[str | None, Field(description="For administrative routes; without one they are off.")] = None
    auth: Annotated[bool, Field(description="false allows a public bind without a key.")] = True
    embeddings: Annotated[str | None, Field(description="Another model reference to serve for /v1/embeddings.")] = None
    served_name: Annotated[str | None, Field(description="The model's name in requests; default: its own.")] = None
    patches: Annotated[list[str], Field(description="NAME=FILE: patches that requests may name; off by default.")] = []
    allowed_hosts: Annotated[list[str], Field(description="Host headers to accept besides the bound address.")] = []
    cors_origins: Annotated[list[str], Field(description="Origins that browsers may call from; none by default.")] = []
    max_body_bytes: Annotated[int, Field(gt=0, description="Largest request body.")] = 4 << 20
    max_prompt_tokens: Annotated[int | None, Field(gt=0, description="Largest prompt; default: the context.")] = None
    max_waiting: Annotated[int, Field(ge=0, description="Requests that may wait before 429 is answered.")] = 256
    max_choices: Annotated[int, Field(gt=0, description="Most choices (`n` times prompts) of one request.")] = 32
    strict_profile: Annotated[
        Literal["open", "openai", "openai-2024"],
        Field(description="What `strict: true` allows of a schema: everything enforceable, or OpenAI's subset."),
    ] = "open"
    grammar_seconds: Annotated[
        float, Field(gt=0, le=60, description="What compiling one request's grammar may take before it is refused.")
    ] = 5.0
    replicas: Annotated[int, Field(ge=1, le=64, description="Processes that serve, behind one router (Ray).")] = 1
    ray_address: Annotated[str | None, Field(description="A running Ray cluster; default: one on this machine.")] = None
    grace_seconds: Annotated[float, Field(ge=0, description="How long a shutdown lets streams finish.")] = 10.0


class EngineOptions(BaseModel):
    """What the engine may use."""

    model_config = ConfigDict(extra="forbid")

    kv_memory: Annotated[int | None, Field(gt=0, description="Bytes for keys and values.")] = None
    max_sequences: Annotated[int, Field(gt=0, description="Sequences decoded at once.")] = 64
    token_budget: Annotated[int, Field(gt=0, description="Tokens computed in one step.")] = 256
    max_context: Annotated[int | None, Field(gt=0, description="Longest sequence, below the model's own limit.")] = None
    speculation: Annotated[str, Field(description="Where drafts come from: lookup, draft, draft:REF or off.")] = (
        "lookup"
    )

    @field_validator("speculation", mode="before")
    @classmethod
    def _off_is_a_word(cls, value: object) -> object:
        return "off" if value is False else value  # YAML reads a bare `off` as false


class Recipe(BaseModel):
    """The keys of `gnomon.yaml` that belong to the house itself."""

    model_config = ConfigDict(extra="forbid")

    gnomon: Annotated[Literal[1], Field(description="Version of this format.")] = 1
    name: Annotated[str | None, Field(description="A name for the result.")] = None
    model: Annotated[str | None, Field(description="Model reference (docs/models.md).")] = None
    merge: Annotated[dict[str, Any] | None, Field(description="A merge file's content, in place of `model`.")] = None
    profile: Annotated[
        str | None, Field(description="Numeric profile: fp32, bf16, int8 or gguf; default: by the weights.")
    ] = None
    threads: Annotated[int | None, Field(gt=0, description="CPU threads; default: the CPUs really available.")] = None
    device: Annotated[str | None, Field(description="Where it runs: cpu.")] = None
    determinism: Annotated[
        Literal["exact", "verified", "fast"] | None,
        Field(description="Networks that run through transformers: refused, verified, or as they are."),
    ] = None
    chat_template: Annotated[str | None, Field(description="Path of a Jinja chat template.")] = None
    engine: EngineOptions = EngineOptions()
    serve: ServeOptions = ServeOptions()


@cache
def schema_model() -> type[Recipe]:
    """Recipe plus one key per installed capability."""
    fields: dict[str, Any] = {}
    for capability in Registry.installed().capabilities.values():
        options = capability.options_model()
        if options is None:
            continue
        if capability.inline and capability.name != "sampling":
            # A capability with one field of its own name (`stop`, `logit_bias`) keeps that short form.
            fields |= {name: (info.annotation, info) for name, info in options.model_fields.items()}
        else:
            fields[capability.name] = (options | None, Field(default=None, description=capability.help))
    return create_model("Recipe", __base__=Recipe, **fields)


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe file, all installed capabilities included."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema_model().model_json_schema()}


def load_recipe(path: Path) -> Recipe:
    """Read and check a recipe file. Raises ConfigError naming the file, the key path and the nearest known key."""
    return check_recipe(read_yaml(path), str(path))


def read_yaml(path: Path) -> Any:
    """A YAML file's content, safely. Raises ConfigError with line and column."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"No file {path}.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None


def check_recipe(content: Any, source: str) -> Recipe:
    if not isinstance(content, dict):
        raise ConfigError(f"{source}: a recipe is a mapping of keys, not {type(content).__name__}.")
    try:
        return schema_model().model_validate(content)
    except ValidationError as error:
        first = option_error(error)
        if isinstance(first, UnknownOption):
            path = first.param or ""
            raise ConfigError(
                f"{source}: unknown key `{path}`.", hint=nearest(path.split(".")[-1], _keys_at(path)), param=path
            ) from None
        raise ConfigError(f"{source}: {first.message}", param=first.param) from None


def _keys_at(path: str) -> list[str]:
    """The known keys beside the last part of a key path."""
    model: Any = schema_model()
    for part in path.split(".")[:-1]:
        annotation = model.model_fields[part].annotation
        options = [a for a in (annotation, *getattr(annotation, "__args__", ())) if hasattr(a, "model_fields")]
        if not options:
            return []
        model = options[0]
    return list(model.model_fields)


def capability_options(recipe: Recipe) -> dict[str, Any]:
    """The recipe's capability keys as the flat options that `Registry.parse` takes (sampling's fields at top level)."""
    given = recipe.model_dump(exclude_unset=True)
    own = set(Recipe.model_fields)
    options = {key: value for key, value in given.items() if key not in own and key != "sampling" and value is not None}
    return {**(given.get("sampling") or {}), **options}


def resolve(ref: str | Path) -> Resolved | None:
    """Resolver hook: a path ending in .yaml/.yml whose content is a recipe (`gnomon:` or `model:` at top level)."""
    path = Path(ref)
    if path.suffix not in SUFFIXES:
        return None
    content = read_yaml(path)
    if isinstance(content, dict) and "gnomon" not in content:
        return None
    recipe = check_recipe(placed(content, path.parent), str(path))
    if (recipe.model is None) == (recipe.merge is None):
        wrong = "names no `model`" if recipe.model is None else "has both `model` and `merge`"
        raise ConfigError(f"{path}: the recipe {wrong}.", hint="Give one of model and merge.", param="model")
    options = capability_options(recipe)
    try:
        Registry.installed().parse({}, Origin.RECIPE, options)
    except UsageError as error:
        raise ConfigError(f"{path}: {error.message}", hint=error.hint, param=error.param) from None
    if recipe.chat_template is not None:
        options["chat_template"] = read_template(Path(recipe.chat_template))
    given = {key: getattr(recipe, key) for key in ("profile", "threads", "device", "determinism")}
    given |= recipe.engine.model_dump(exclude_unset=True)
    source: Any = recipe.model
    if recipe.merge is not None:
        from gnomon.merge.build import open_merge

        source = open_merge(recipe.merge, folder=path.parent)
    return Resolved(source, options, settings={key: v for key, v in given.items() if v is not None})


def placed(content: Any, folder: Path) -> Any:
    """A recipe's content with its paths made relative to here: in the file they are relative to the file's folder.

    A model and a patch is a path when it begins with ./ or ../; a chat template always is.
    """
    if not isinstance(content, dict):
        return content
    moved = dict(content)
    if isinstance(model := content.get("model"), str):
        moved["model"] = _moved(model, folder)
    if isinstance(patches := content.get("patches"), list):
        moved["patches"] = [_moved(entry, folder) if isinstance(entry, str) else entry for entry in patches]
    if isinstance(template := content.get("chat_template"), str):
        moved["chat_template"] = str(folder / template)
    return moved


def read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"The chat template {path} cannot be read: {error}.", param="chat_template") from None


def _moved(reference: str, folder: Path) -> str:
    return str(folder / reference) if reference.startswith(("./", "../")) else reference
