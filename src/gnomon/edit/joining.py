"""How edits join recipes, `generate` and the command: the key `edit`, built once and kept by content.

The patch of a recipe's facts is made when the model is loaded with it (or at the first call that names them), kept in
the cache under what it depends on, and runs beside the weights from then on. A request may not set the key: it would
make the server compute; `POST /v1/edits` is the operator's way.
"""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from gnomon.capability import OPERATOR_ONLY
from gnomon.errors import EditError, UnsupportedModel
from gnomon.models.cache import cache_dir
from gnomon.stages import StageContext

if TYPE_CHECKING:
    from gnomon.model import Model
    from gnomon.models.patch import Patch

VERSION = 1
_BUILDING = threading.Lock()


class EditOptions(BaseModel):
    """Facts to change, and how."""

    model_config = ConfigDict(extra="forbid")

    facts: Annotated[
        list[str | dict[str, Any]], OPERATOR_ONLY, Field(min_length=1, description='"PROMPT -> TARGET", or records.')
    ]
    method: Annotated[str, OPERATOR_ONLY, Field(description="`gnomon edit methods` lists them.")] = "rome"
    layers: Annotated[list[int] | None, OPERATOR_ONLY, Field(description="Default: the model's profile.")] = None
    moments: Annotated[str, OPERATOR_ONLY, Field(description="Text not to disturb: self, identity, or a file.")] = (
        "self"
    )
    tokens: Annotated[int | None, OPERATOR_ONLY, Field(gt=0, description="Tokens of that text.")] = None
    options: Annotated[dict[str, Any], OPERATOR_ONLY, Field(description="Options of the method.")] = {}

    @model_validator(mode="before")
    @classmethod
    def _short(cls, value: Any) -> Any:
        """A fact, or a list of them, stands for {facts: [...]}."""
        if isinstance(value, str):
            return {"facts": [value]}
        return {"facts": value} if isinstance(value, list) else value


def chosen(options: EditOptions, context: StageContext) -> list[str]:
    """The weights stage: the edit's patch, loaded under a name of its content; made the first time."""
    model: Model = context.host
    if model.network is None:
        raise UnsupportedModel(f"`{model.name}` has no weights of its own to edit.", hint="Edit its members.")
    plain = model.unpatched.with_patches([])
    plain.defaults = {}
    key = _key(plain, options)
    name = f"edit-{key[:16]}"
    with _BUILDING:
        if name not in model.patches:
            file = cache_dir() / "edit" / "patches" / f"{key}.patch.safetensors"
            if not file.exists():
                build(plain, options).save(file)
            model.patches.add(name, file)
    return [name]


def build(model: Model, options: EditOptions) -> Patch:
    """The patch of these options. Raises EditError naming the facts that do not hold in the model's own text."""
    from gnomon.edit.api import edit

    more = {} if options.tokens is None else {"tokens": options.tokens}
    patch = edit(
        model,
        options.facts,
        method=options.method,
        layers=options.layers,
        moments=options.moments,
        **more,  # type: ignore[arg-type]
        **options.options,
    )
    failed = [told["prompt"] for told in patch.report["facts"] if told.get("holds") is False]
    if failed:
        raise EditError(f"`edit`: these facts do not hold after the edit: {'; '.join(failed)}.", param="edit.facts")
    return patch.to_low_rank(energy=1.0) if not patch.is_low_rank else patch


def _key(model: Model, options: EditOptions) -> str:
    weights = model.profile.weights if model.profile else model.checkpoint.identity
    parts: dict[str, Any] = {"version": VERSION, "weights": weights, **options.model_dump(mode="json")}
    if options.moments not in ("self", "identity"):
        corpus = Path(options.moments)
        parts["moments"] = hashlib.sha256(corpus.read_bytes()).hexdigest() if corpus.is_file() else options.moments
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
