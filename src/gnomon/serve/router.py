"""The router before replicas: one address, several servers with the same bits.

A request goes to the replica that its session belongs to. Every replica gives the same bits, so one that dies loses
nothing: the request is made again on another, and a stream goes on where it was cut, after the events already sent were
found equal. A request without a seed gets one here, before it is sent. Knows nothing of models or of how replicas run.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import PlainTextResponse, Response, StreamingResponse

from gnomon.errors import EngineFailure, NotReady, UsageError
from gnomon.serve import errors

log = logging.getLogger("gnomon.serve")
PURE = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
"""What may be made again anywhere: the same request gives the same bits."""
SEEDED = ("/v1/chat/completions", "/v1/completions")
PASSED_BACK = ("content-type", "retry-after", "cache-control", "content-security-policy", "x-content-type-options")
PATIENCE = 120.0
"""Seconds that a request waits for some replica to be alive."""


class Fleet(Protocol):
    """Who is alive."""

    key: str

    def addresses(self) -> dict[int, str]:
        """Number -> base address of every replica that is up."""

    def failed(self, number: int, address: str) -> None:
        """This replica did not answer at this address: it is not up until it says so itself."""


@dataclass
class Counts:
    """requests: accepted. retries: made again on another replica. resumed: streams that went on there."""

    requests: int = 0
    retries: int = 0
    resumed: int = 0


def create_router(fleet: Fleet) -> FastAPI:
    """The ASGI application; put the gate before it."""
    app = FastAPI(title="gnomon router", openapi_url=None)
    errors.install(app)
    router = Router(fleet)
    app.state.router = router

    @app.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"status": "ok", "replicas": sorted(fleet.addresses())}

    @app.get("/metrics")
    async def metrics() -> Response:
        lines = [f"gnomon_router:{name}_total {value}" for name, value in vars(router.counts).items()]
        return PlainTextResponse("\n".join([f"gnomon_router:replicas {len(fleet.addresses())}", *lines]) + "\n")

    @app.api_route("/{path:path}", methods=["GET", "POST"])
    async def everything(request: Request) -> Response:
        return await router.handle(request)

    return app


class Router:
    """Forwards, tries again, and keeps count."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet = fleet
        self.counts = Counts()
        self.client = httpx.AsyncClient(
            timeout=httpx.Timeout(None, connect=5.0), limits=httpx.Limits(max_connections=None)
        )

    async def handle(self, request: Request) -> Response:
        path = request.url.path
        if request.method == "POST" and path not in PURE:
            raise UsageError(
                f"POST {path} is not served with replicas: it would change one of them and not the others.",
                hint="Serve it from a single process (without --replicas).",
            )
        body = await request.body()
        content = _parsed(body) if request.method == "POST" else None
        if content is not None and path in SEEDED and content.get("seed") is None:
            content["seed"] = secrets.randbits(32)
            body = json.dumps(content).encode()
        self.counts.requests += 1
        attempt = _Attempt(request.method, path, dict(request.query_params), body, session_of(request, content))
        if content is not None and content.get("stream") is True:
            return await self._stream(attempt)
        return await self._whole(attempt)

    async def _whole(self, attempt: _Attempt) -> Response:
        while True:
            number, address = await self._choose(attempt)
            try:
                reply = await self.client.send(self._request(attempt, address))
            except httpx.TransportError as error:
                self._failed(number, address, error)
                continue
            if reply.status_code == 503 and _leaving(reply.content):
                self._failed(number, address, "it is shutting down")
                continue
            return Response(reply.content, reply.status_code, _headers(reply))

    async def _stream(self, attempt: _Attempt) -> Response:
        """The first answer decides whether it is a stream or a refusal; from then on only events are compared."""
        while True:
            number, address = await self._choose(attempt)
            try:
                reply = await self.client.send(self._request(attempt, address), stream=True)
                if reply.status_code != 200:
                    content = await reply.aread()
                    await reply.aclose()
                    if reply.status_code == 503 and _leaving(content):
                        self._failed(number, address, "it is shutting down")
                        continue
                    return Response(content, reply.status_code, _headers(reply))
            except httpx.TransportError as error:
                self._failed(number, address, error)
                continue
            headers = _headers(reply)
            return StreamingResponse(self._events(attempt, reply, number, address), 200, headers)

    async def _events(
        self, attempt: _Attempt, reply: httpx.Response, number: int, address: str
    ) -> AsyncIterator[bytes]:
        sent: list[str] = []  # what each sent event said, without the names that differ between attempts
        names: dict[str, Any] = {}
        while True:
            place = 0
            try:
                async for event in _sse(reply):
                    said, named, event = _renamed(event, names)
                    names = names or named
                    if place < len(sent):
                        if said != sent[place]:
                            failure = EngineFailure("A replica died, and another went on differently: the stream ends.")
                            log.error("event %d of a resumed stream differs", place)
                            yield errors.event(failure).encode()
                            yield b"data: [DONE]\n\n"
                            return
                    else:
                        sent.append(said)
                        yield event.encode()
                    place += 1
                    if said == "[DONE]":
                        return
                raise httpx.RemoteProtocolError("the stream ended before its end")
            except httpx.TransportError as error:
                self._failed(number, address, error)
            finally:
                await reply.aclose()
            self.counts.resumed += 1
            reply, number, address = await self._again(attempt)

    async def _again(self, attempt: _Attempt) -> tuple[httpx.Response, int, str]:
        while True:
            number, address = await self._choose(attempt)
            try:
                reply = await self.client.send(self._request(attempt, address), stream=True)
            except httpx.TransportError as error:
                self._failed(number, address, error)
                continue
            if reply.status_code == 200:
                return reply, number, address
            await reply.aclose()
            if reply.status_code not in (429, 503):
                self._failed(number, address, f"status {reply.status_code}")
            await asyncio.sleep(0.2)

    def _request(self, attempt: _Attempt, address: str) -> httpx.Request:
        headers = {"Authorization": f"Bearer {self.fleet.key}", "Content-Type": "application/json"}
        return self.client.build_request(
            attempt.method, address + attempt.path, params=attempt.query, content=attempt.body, headers=headers
        )

    async def _choose(self, attempt: _Attempt) -> tuple[int, str]:
        """The session's own replica, or the next in its order that lives. Raises NotReady after some patience."""
        for _ in range(int(PATIENCE / 0.1)):
            living = self.fleet.addresses()
            if living:
                number = max(living, key=lambda n: hashlib.sha256(f"{attempt.session}/{n}".encode()).digest())
                return number, living[number]
            await asyncio.sleep(0.1)
        raise NotReady("No replica is alive.")

    def _failed(self, number: int, address: str, why: object) -> None:
        self.counts.retries += 1
        log.warning("replica %d failed: %s", number, why)
        self.fleet.failed(number, address)


@dataclass(frozen=True)
class _Attempt:
    method: str
    path: str
    query: dict[str, str]
    body: bytes
    session: str


def session_of(request: Request, content: dict[str, Any] | None) -> str:
    """What stays together: `X-Session-Id`, else `user`, else the prompt's beginning, whose pages are cached there."""
    if given := request.headers.get("x-session-id"):
        return given
    if content is None:
        return request.url.path
    if isinstance(content.get("user"), str):
        return str(content["user"])
    messages = content.get("messages")
    start = messages[:1] if isinstance(messages, list) else content.get("prompt", content.get("input"))
    return json.dumps(start)[:512]


def _parsed(body: bytes) -> dict[str, Any] | None:
    """A JSON object; anything else goes on as it is, to be refused where bodies are read."""
    try:
        content = json.loads(body)
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _headers(reply: httpx.Response) -> dict[str, str]:
    return {name: value for name, value in reply.headers.items() if name in PASSED_BACK}


def _leaving(content: bytes) -> bool:
    """Whether a 503 says that the server goes, or is not there yet."""
    return b"shutting down" in content or b"starting" in content


async def _sse(reply: httpx.Response) -> AsyncIterator[str]:
    """Whole events, their blank line included."""
    waiting = ""
    async for text in reply.aiter_text():
        waiting += text
        while (end := waiting.find("\n\n")) >= 0:
            yield waiting[: end + 2]
            waiting = waiting[end + 2 :]


def _renamed(event: str, names: dict[str, Any]) -> tuple[str, dict[str, Any], str]:
    """(what it says without id and time, its own id and time, the event under the names already in use)."""
    data = event.removeprefix("data: ").strip()
    try:
        content = json.loads(data)
    except ValueError:
        return data, {}, event
    if not isinstance(content, dict):
        return data, {}, event
    own = {name: content[name] for name in ("id", "created") if name in content}
    said = json.dumps({name: value for name, value in content.items() if name not in own}, sort_keys=True)
    if names and own:
        event = f"data: {json.dumps({**content, **{name: names[name] for name in own}})}\n\n"
    return said, own, event
