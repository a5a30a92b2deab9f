"""Health, readiness, metrics, version, the list of models, and the studio page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, PlainTextResponse, Response

from gnomon.errors import NotReady
from gnomon.model import Model
from gnomon.serve.state import state_of
from gnomon.version import __version__

router = APIRouter()
INDEX = Path(__file__).parent / "studio" / "index.html"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
    "frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", include_in_schema=False)
async def studio() -> Response:
    """The studio page."""
    return FileResponse(INDEX, headers=HEADERS)


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz")
async def readyz(request: Request) -> dict[str, Any]:
    """The models are loaded and take requests (503 otherwise)."""
    state = state_of(request)
    if not state.ready or state.draining:
        raise NotReady("The server is shutting down." if state.draining else "The server is starting.")
    return {"status": "ready", "models": list(state.models)}


@router.get("/version")
async def version() -> dict[str, str]:
    """The server's version."""
    return {"version": __version__}


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    """Prometheus metrics."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@router.get("/v1/determinism")
async def determinism(request: Request) -> dict[str, Any]:
    """Per model: what its self-test on this machine compared, and the result. `null` while it still runs."""
    state = state_of(request)
    return {
        "object": "list",
        "data": [
            {"id": name, "certificate": certificate.as_dict() if certificate else None, "sentinel": _sentinel(model)}
            for name, model in state.models.items()
            if model.encoder is None
            for certificate in (state.certificates.get(name),)
        ],
    }


def _sentinel(model: Model) -> dict[str, int]:
    stats = model.stats()
    return {"replays": stats.sentinel_replays, "mismatches": stats.sentinel_mismatches}


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The models this server was started with."""
    state = state_of(request)
    return {"object": "list", "data": [_describe(request, name) for name in state.models]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """One model."""
    state_of(request).model(name)
    return _describe(request, name)


def _describe(request: Request, name: str) -> dict[str, Any]:
    state = state_of(request)
    model = state.models[name]
    described: dict[str, Any] = {"id": name, "object": "model", "created": state.created, "owned_by": "gnomon"}
    described["fingerprint"] = model.fingerprint
    if model.encoder is None and model.profile is not None:
        described |= {"max_model_len": model.max_context, "profile": model.profile.dtype, "chat": model.can_chat}
    else:
        described["kind"] = "embedding"
    return described
