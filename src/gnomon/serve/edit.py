"""POST /v1/edits: make a patch from facts and load it under a name that requests may use. The operator's alone."""

from __future__ import annotations

import asyncio
import re
from typing import Any

from fastapi import APIRouter, Depends, Request
from pydantic import BaseModel, ConfigDict, Field

from gnomon.edit.api import edit
from gnomon.errors import EditError, PatchNotFound, UnsupportedModel
from gnomon.model import Model
from gnomon.serve.admin import require_admin
from gnomon.serve.body import read_json, schema
from gnomon.serve.protocol import parse
from gnomon.serve.state import ServerState, state_of

router = APIRouter(dependencies=[Depends(require_admin)])


class EditBody(BaseModel):
    """POST /v1/edits. name: under which requests choose it (`"patches": [name]`); default: made from its content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    facts: list[str | dict[str, Any]] = Field(min_length=1)
    method: str = "rome"
    layers: list[int] | None = None
    options: dict[str, Any] = {}
    name: str | None = Field(default=None, max_length=100)
    model: str | None = None
    keep_failed: bool = False


@router.post("/v1/edits", openapi_extra=schema(EditBody))
async def make(request: Request) -> dict[str, Any]:
    """Edit the served model; requests go on meanwhile. 400 when a fact does not hold and keep_failed is false."""
    body = parse(EditBody, await read_json(request))
    state = state_of(request)
    name, model = _model(state, body.model)
    return await asyncio.to_thread(_make, name, model, body)


@router.get("/v1/edits")
async def edits(request: Request) -> dict[str, Any]:
    """The loaded patches that are edits."""
    found = [
        {**laid.describe(), "model": name, "facts": laid.patch.metadata.get("facts", [])}
        for name, model in state_of(request).models.items()
        if model.network is not None
        for laid in model.patches
        if laid.patch.metadata.get("kind") == "edit"
    ]
    return {"object": "list", "data": found}


@router.get("/v1/edits/{id}")
async def report(request: Request, id: str, model: str | None = None) -> dict[str, Any]:
    """One edit's provenance and report."""
    _, found = _model(state_of(request), model)
    for laid in found.patches:
        if laid.name == id and laid.patch.metadata.get("kind") == "edit":
            return {**laid.describe(), "metadata": dict(laid.patch.metadata), "report": dict(laid.patch.report)}
    raise PatchNotFound(f"No edit `{id[:100]}` is loaded.", param="id")


@router.delete("/v1/edits/{id}")
async def remove(request: Request, id: str, model: str | None = None) -> dict[str, Any]:
    """Forget an edit; requests that began with it end with it."""
    _, found = _model(state_of(request), model)
    found.patches.remove(id)
    return {"id": id, "object": "edit", "deleted": True}


def _make(name: str, model: Model, body: EditBody) -> dict[str, Any]:
    patch = edit(model, body.facts, method=body.method, layers=body.layers, **body.options)
    failed = [told["prompt"] for told in patch.report["facts"] if told.get("holds") is False]
    if failed and not body.keep_failed:
        raise EditError(f"These facts do not hold after the edit: {'; '.join(failed)}.", param="facts")
    if not patch.is_low_rank:
        patch = patch.to_low_rank(energy=0.9999)
    own = body.name or "edit-" + re.sub(r"[^0-9a-f]", "", patch.identity)[:16]
    laid = model.patches.add(own, patch)
    return {**laid.describe(), "object": "edit", "model": name, "report": dict(patch.report)}


def _model(state: ServerState, name: str | None) -> tuple[str, Model]:
    if name is not None:
        return name, state.model(name)
    for served, model in state.models.items():
        if model.network is not None:
            return served, model
    raise UnsupportedModel("No model that could be edited is served here.")
