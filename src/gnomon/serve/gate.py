"""What a request must pass before any route sees it: host, origin, body kind and size, key.

A plain ASGI middleware, so that streams are never buffered. Against DNS rebinding the Host header is checked against
an allow-list; against cross-site posts a foreign Origin and a non-JSON body are refused; the key is compared in
constant time. Knows nothing of models.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable
from dataclasses import dataclass
from urllib.parse import urlsplit

from fastapi.responses import Response
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnomon.errors import GnomonError
from gnomon.serve import errors

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
OPEN_PATHS = ("/", "/healthz", "/readyz", "/version")
"""Answered without a key: they tell nothing of anyone's text."""
OPEN_PREFIXES = ("/studio/",)


@dataclass(frozen=True)
class GatePolicy:
    """Who may call. hosts: accepted Host names; ("*",) accepts all. origins: foreign Origins that browsers may use."""

    hosts: tuple[str, ...]
    origins: tuple[str, ...] = ()
    api_key: str | None = None
    admin_key: str | None = None
    max_body_bytes: int = 4 << 20


class Gate:
    """The middleware."""

    def __init__(self, app: ASGIApp, policy: GatePolicy) -> None:
        self.app = app
        self.policy = policy

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if (refusal := self._refusal(scope, headers)) is not None:
            await refusal(scope, receive, send)
            return
        await self.app(scope, self._limited(receive), send)

    def _refusal(self, scope: Scope, headers: Headers) -> Response | None:
        policy, method, path = self.policy, scope["method"], scope["path"]
        host = headers.get("host", "")
        if not _host_allowed(host, policy.hosts):
            return errors.response(
                f"Host `{host[:100]}` is not served here; the operator may add it with --allowed-host.",
                403,
                code="host",
            )
        origin = headers.get("origin")
        if origin and not _origin_allowed(origin, host, policy.origins):
            return errors.response(
                f"Origin `{origin[:100]}` may not call this server; the operator may allow it with --cors-origin.",
                403,
                code="origin",
            )
        if method == "POST":
            kind = headers.get("content-type", "").split(";")[0].strip().lower()
            if kind != "application/json":
                return errors.response("Send a JSON body: Content-Type: application/json.", 415, code="content_type")
            length = headers.get("content-length", "0")
            if not length.isdigit() or int(length) > policy.max_body_bytes:
                return self.too_large()
        if method != "OPTIONS" and not _is_open(path) and not self._key_fits(headers, path):
            return errors.response(
                "Wrong or missing API key: send `Authorization: Bearer KEY`.",
                401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return None

    def _key_fits(self, headers: Headers, path: str) -> bool:
        keys = [key for key in (self.policy.api_key, self.policy.admin_key) if key]
        if self.policy.api_key is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        # Every key is compared, in constant time each, so that timing tells nothing.
        fits = [hmac.compare_digest(given.strip().encode(), key.encode()) for key in keys]
        return scheme.lower() == "bearer" and any(fits)

    def too_large(self) -> Response:
        return errors.response(
            f"The body is larger than {self.policy.max_body_bytes} bytes; the operator may raise --max-body-bytes.",
            413,
            code="body_too_large",
        )

    def _limited(self, receive: Receive) -> Receive:
        """Count the body as it arrives: a chunked upload states no length."""
        seen = 0

        async def limited() -> Message:
            nonlocal seen
            message = await receive()
            if message["type"] == "http.request":
                seen += len(message.get("body", b""))
                if seen > self.policy.max_body_bytes:
                    raise BodyTooLarge(self.policy.max_body_bytes)
            return message

        return limited


class BodyTooLarge(GnomonError):
    """A chunked body outgrew the limit."""

    status = 413
    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"The body is larger than {limit} bytes.", hint="The operator may raise --max-body-bytes.")


def allowed_hosts(bind: str, more: Iterable[str]) -> tuple[str, ...]:
    """Host names to accept for a bind address; binding to all addresses accepts all unless names are given."""
    given = tuple(more)
    if bind in ("0.0.0.0", "::", "") and not given:
        return ("*",)
    return (*LOOPBACK, bind, *given)


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host


def _host_allowed(host: str, allowed: tuple[str, ...]) -> bool:
    return "*" in allowed or _host_name(host).lower() in {name.lower() for name in allowed}


def _origin_allowed(origin: str, host: str, allowed: tuple[str, ...]) -> bool:
    return "*" in allowed or origin in allowed or urlsplit(origin).netloc.lower() == host.lower()


def _is_open(path: str) -> bool:
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)
