"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}, for HTTP bodies and streams alike."""

from __future__ import annotations

import json
import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from gnomon.errors import GnomonError

log = logging.getLogger("gnomon.serve")
RETRY_SECONDS = 1
KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


def body(message: str, status: int, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The error object itself."""
    kind = KINDS.get(status, "server_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def response(
    message: str,
    status: int,
    *,
    param: str | None = None,
    code: str | None = None,
    headers: dict[str, str] | None = None,
) -> Response:
    extra = dict(headers or {})
    if status in (429, 503):
        extra.setdefault("Retry-After", str(RETRY_SECONDS))
    return JSONResponse(body(message, status, param=param, code=code), status, extra)


def of(error: GnomonError) -> Response:
    return response(str(error), error.status, param=error.param, code=error.code)


def event(error: GnomonError) -> str:
    """An error in the middle of a stream, as a server-sent event."""
    return f"data: {json.dumps(body(str(error), error.status, param=error.param, code=error.code))}\n\n"


def install(app: FastAPI) -> None:
    """Give every failure of the app this shape; a bug is logged with its traceback and shown without."""

    async def known(request: Request, error: Exception) -> Response:
        return of(error) if isinstance(error, GnomonError) else await unknown(request, error)

    async def http(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            return await unknown(request, error)
        what = f"No such route: {request.method} {request.url.path}." if error.status_code == 404 else str(error.detail)
        return response(what, error.status_code, headers=dict(error.headers or {}))

    async def unknown(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return response("Internal error; the server's log has the details.", 500, code="internal_error")

    app.add_exception_handler(GnomonError, known)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, unknown)
