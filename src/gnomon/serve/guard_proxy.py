"""A proxy that guards any OpenAI-compatible server: requests in, the upstream's answers out, checked on the way.

One guard session for each text of each choice: content, reasoning, refusal, arguments of each tool call. Fields of a
delta that are not known are not passed on, and log-probabilities never are: they spell the text. When every choice is
blocked the upstream connection is closed. Knows nothing of models.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from gnomon.errors import Blocked, GnomonError
from gnomon.guard.guard import Guard
from gnomon.guard.session import Session
from gnomon.guard.vault import Restorer, Vault
from gnomon.serve import errors
from gnomon.serve.body import read_json

TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
PATHS = ("chat/completions", "completions")


class GuardedChoice:
    """The sessions of one choice, by the place of their text in the delta."""

    def __init__(self, guard: Guard, vault: Vault, prompt: str) -> None:
        self.guard, self.vault, self.prompt = guard, vault, prompt
        self.sessions: dict[tuple[str, int], tuple[Session, Restorer]] = {}
        self.blocked = False
        self.told = 0

    def through(self, place: tuple[str, int], text: str) -> str:
        session, restorer = self.sessions.setdefault(
            place, (self.guard.session(prompt=self.prompt), Restorer(self.vault))
        )
        out = restorer.push(session.push(text))
        self.blocked |= session.verdict in ("block", "guard_error")
        return out

    def rest(self) -> dict[tuple[str, int], str]:
        """What the sessions held, when the choice ends."""
        found = {}
        for place, (session, restorer) in self.sessions.items():
            text = restorer.push(session.finish()) + restorer.finish()
            self.blocked |= session.verdict in ("block", "guard_error")
            if text:
                found[place] = text
        return found

    def findings(self) -> list[dict[str, Any]]:
        return [
            {**finding.as_dict(), "where": where}
            for (where, _), (session, _) in self.sessions.items()
            for finding in session.findings
        ]


def create_proxy(upstream: str, guard: Guard, *, client: httpx.AsyncClient | None = None) -> FastAPI:
    """An application that forwards /v1/... to `upstream`, guarding completions. Other POSTs are refused."""
    http = client or httpx.AsyncClient(timeout=httpx.Timeout(600, connect=10))

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await http.aclose()

    app = FastAPI(title="gnomon guard proxy", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)
    errors.install(app)
    base = upstream.rstrip("/").removesuffix("/v1")

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/{path:path}")
    async def get(request: Request, path: str) -> Response:
        reply = await _send(http.get(f"{base}/v1/{path}", headers=_headers(request)))
        return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))

    @app.post("/v1/{path:path}")
    async def post(request: Request, path: str) -> Response:
        if path not in PATHS:
            return errors.response(f"The proxy guards {', '.join(PATHS)}; not {path}.", 404)
        body = await read_json(request)
        vault = Vault()
        prompt = _check_prompt(body, guard, vault)
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
        url = f"{base}/v1/{path}"
        if body.get("stream"):
            return await _streamed(http, url, body, request, guard, vault, prompt)
        reply = await _send(http.post(url, json=body, headers=_headers(request)))
        if reply.status_code != 200:
            return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))
        return JSONResponse(_whole(reply.json(), guard, vault, prompt))

    return app


def _headers(request: Request) -> dict[str, str]:
    names = ("authorization", "openai-organization", "openai-project")
    return {name: request.headers[name] for name in names if name in request.headers}


async def _send(call: Any) -> httpx.Response:
    try:
        reply: httpx.Response = await call
    except httpx.HTTPError as error:
        failure = GnomonError(f"The upstream server did not answer: {type(error).__name__}.")
        failure.status = 502
        raise failure from None
    return reply


def _check_prompt(body: Any, guard: Guard, vault: Vault) -> str:
    """The request's texts through the input checks, in place -> the last one. Raises Blocked."""
    last = ""

    def checked(text: str) -> str:
        nonlocal last
        vault.reserve(text)
        result = guard.scan(text, "input", vault=vault)
        if result.verdict in ("block", "guard_error"):
            raise Blocked("The prompt was refused by the guard.", param="messages")
        last = result.text
        return result.text

    def walk(value: Any) -> Any:
        if isinstance(value, str):
            return checked(value)
        if isinstance(value, dict):
            keep = ("role", "type", "id", "tool_call_id")
            return {key: inner if key in keep else walk(inner) for key, inner in value.items()}
        return [walk(inner) for inner in value] if isinstance(value, list) else value

    for key in ("messages", "prompt"):
        if key in body and guard.has_input:
            body[key] = walk(body[key])
    return last


def _whole(answer: dict[str, Any], guard: Guard, vault: Vault, prompt: str) -> dict[str, Any]:
    for choice in answer.get("choices", []):
        guarded = GuardedChoice(guard, vault, prompt)
        holder = choice.get("message", choice)
        choice["logprobs"] = None
        for place, text in list(_texts(holder)):
            out = guarded.through(place, text)
            _put(holder, place, out)
        for place, text in guarded.rest().items():
            _put(holder, place, (_get(holder, place) or "") + text)
        if guarded.blocked:
            choice["finish_reason"] = "content_filter"
        if found := guarded.findings():
            choice["guard"] = {"findings": found}
    return answer


def _texts(holder: Mapping[str, Any]) -> list[tuple[tuple[str, int], str]]:
    """Every text of a message, delta or completion choice, with its place."""
    found = [((name, 0), holder[name]) for name in (*TEXTS, "text") if isinstance(holder.get(name), str)]
    for call in holder.get("tool_calls") or []:
        arguments = (call.get("function") or {}).get("arguments")
        if isinstance(arguments, str):
            found.append((("tool_calls", call.get("index", 0)), arguments))
    return found


def _get(holder: Mapping[str, Any], place: tuple[str, int]) -> str | None:
    return next((text for where, text in _texts(holder) if where == place), None)


def _put(holder: dict[str, Any], place: tuple[str, int], text: str) -> None:
    name, number = place
    if name != "tool_calls":
        holder[name] = text
        return
    for call in holder.get("tool_calls") or []:
        if call.get("index", 0) == number:
            call["function"]["arguments"] = text
            return
    holder.setdefault("tool_calls", []).append({"index": number, "function": {"arguments": text}})


async def _streamed(
    http: httpx.AsyncClient, url: str, body: Any, request: Request, guard: Guard, vault: Vault, prompt: str
) -> Response:
    upstream = http.build_request("POST", url, json=body, headers=_headers(request))
    reply = await _send(http.send(upstream, stream=True))
    if reply.status_code != 200:
        content = await reply.aread()
        return Response(content, reply.status_code, media_type=reply.headers.get("content-type"))

    async def lines() -> AsyncIterator[str]:
        choices: dict[int, GuardedChoice] = {}
        ended: set[int] = set()
        wanted = int(body.get("n") or 1)
        try:
            async for line in reply.aiter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    yield _event({"error": {"message": "The upstream server failed.", "type": "server_error"}})
                    break
                if (shown := _guarded(event, choices, ended, guard, vault, prompt)) is not None:
                    yield _event(shown)
                if len(ended) >= wanted and all(one.blocked for one in choices.values()):
                    break  # nothing more may be shown: the upstream need not go on
        except (httpx.HTTPError, ValueError):
            yield _event({"error": {"message": "The upstream stream broke.", "type": "server_error"}})
        finally:
            await reply.aclose()
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False, separators=(',', ':'))}\n\n"


def _guarded(
    event: dict[str, Any],
    choices: dict[int, GuardedChoice],
    ended: set[int],
    guard: Guard,
    vault: Vault,
    prompt: str,
) -> dict[str, Any] | None:
    """One upstream event as it may be shown; None for nothing."""
    shown = []
    for choice in event.get("choices", []):
        index = choice.get("index", 0)
        if index in ended:
            continue
        guarded = choices.setdefault(index, GuardedChoice(guard, vault, prompt))
        chat = "delta" in choice
        given = choice["delta"] if chat else choice
        holder: dict[str, Any] = {"role": given["role"]} if chat and given.get("role") else {}
        if chat and given.get("tool_calls"):
            holder["tool_calls"] = [
                {**call, "function": {**(call.get("function") or {}), "arguments": ""}} for call in given["tool_calls"]
            ]
        for place, text in _texts(given):
            _put(holder, place, guarded.through(place, text))
        reason = choice.get("finish_reason")
        if reason is not None or guarded.blocked:
            for place, text in guarded.rest().items():
                _put(holder, place, (_get(holder, place) or "") + text)
            reason = "content_filter" if guarded.blocked else reason
            ended.add(index)
        one = {"index": index, "finish_reason": reason, "logprobs": None}
        one |= {"delta": holder} if chat else {"text": holder.get("text", "")}
        if reason is not None and (found := guarded.findings()):
            one["guard"] = {"findings": found}
        shown.append(one)
    if not shown and event.get("choices"):
        return None
    return {**event, "choices": shown}
