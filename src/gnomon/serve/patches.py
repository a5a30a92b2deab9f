"""GET, POST, DELETE /v1/patches: which patches requests may name. The operator's alone (admin key)."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from gnomon.errors import UnsupportedModel
from gnomon.model import Model
from gnomon.patches.table import Laid
from gnomon.serve.admin import require_admin
from gnomon.serve.body import read_json, schema
from gnomon.serve.protocol import parse
from gnomon.serve.state import ServerState, state_of

router = APIRouter(dependencies=[Depends(require_admin)])


class PatchBody(BaseModel):
    """POST /v1/patches. file: a patch file or a PEFT LoRA directory on the server's machine."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=100)
    file: str = Field(min_length=1)
    model: str | None = None


@router.get("/v1/patches")
async def patches(request: Request) -> dict[str, Any]:
    """Every loaded patch of every model."""
    state = state_of(request)
    data = [_described(name, laid) for name, model in _models(state) for laid in model.patches]
    return {"object": "list", "data": data}


@router.post("/v1/patches", openapi_extra=schema(PatchBody))
async def add(request: Request) -> dict[str, Any]:
    """Load a patch under a name; requests may use it at once, running ones do not notice."""
    body = parse(PatchBody, await read_json(request))
    name, model = _model(state_of(request), body.model)
    laid = await asyncio.to_thread(model.patches.add, body.name, body.file)
    return _described(name, laid)


@router.delete("/v1/patches/{name}")
async def remove(request: Request, name: str, model: str | None = None) -> dict[str, Any]:
    """Forget a patch; requests that began with it end with it."""
    _, found = _model(state_of(request), model)
    found.patches.remove(name)
    return {"id": name, "object": "patch", "deleted": True}


def _models(state: ServerState) -> list[tuple[str, Model]]:
    """The models that can wear patches, the default first."""
    return [(name, model) for name, model in state.models.items() if model.network is not None]


def _model(state: ServerState, name: str | None) -> tuple[str, Model]:
    if name is not None:
        return name, state.model(name)
    models = _models(state)
    if not models:
        raise UnsupportedModel("No model that could wear a patch is served here.")
    return models[0]


def _described(model: str, laid: Laid) -> dict[str, Any]:
    return {**laid.describe(), "model": model}
