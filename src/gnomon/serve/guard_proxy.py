"""A proxy that guards any OpenAI-compatible server: requests in, the upstream's answers out, checked on the way.

One guard session for each text of each choice: content, reasoning, refusal, arguments of each tool call. Fields that
are not known are not passed on, and log-probabilities never are: they spell the text. When every choice is blocked the
upstream connection is closed. Scanners never hold up other streams. Knows nothing of models.
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
from gnomon.serve.waiting import beside

TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
TOP = ("id", "object", "created", "model", "system_fingerprint", "service_tier", "usage")
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
        prompt = await beside(_check_prompt, body, guard, vault)
        body.pop("logprobs", None)
        body.pop("top_logprobs", None)
        url = f"{base}/v1/{path}"
        if body.get("stream"):
            return await _streamed(http, url, body, request, guard, vault, prompt)
        reply = await _send(http.post(url, json=body, headers=_headers(request)))
        if reply.status_code != 200:
            return Response(reply.content, reply.status_code, media_type=reply.headers.get("content-type"))
        return JSONResponse(await beside(_whole, reply.json(), guard, vault, prompt))

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
        result = guard.scan(vault.escaped(text), "input", vault=vault)
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
    choices = []
    for choice in answer.get("choices", []):
        guarded = GuardedChoice(guard, vault, prompt)
        chat = "message" in choice
        given = choice["message"] if chat else choice
        holder = _frame(given)
        for place, text in _texts(given):
            _put(holder, place, guarded.through(place, text))
        for place, text in guarded.rest().items():
            _put(holder, place, (_get(holder, place) or "") + text)
        reason = "content_filter" if guarded.blocked else choice.get("finish_reason")
        one = {"index": choice.get("index", 0), "finish_reason": reason, "logprobs": None}
        one |= {"message": holder} if chat else {"text": holder.get("text", "")}
        if found := guarded.findings():
            one["guard"] = {"findings": found}
        choices.append(one)
    return _known(answer, choices)


def _known(event: Mapping[str, Any], choices: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: event[name] for name in TOP if name in event} | {"choices": choices}


def _frame(given: Mapping[str, Any]) -> dict[str, Any]:
    """A message or delta without its texts, and without what is not known."""
    frame: dict[str, Any] = {name: None for name in TEXTS if name in given and given[name] is None}
    if given.get("role"):
        frame["role"] = given["role"]
    if given.get("tool_calls"):
        frame["tool_calls"] = [_call(call) for call in given["tool_calls"]]
    return frame


def _call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are yet to come."""
    name = (call.get("function") or {}).get("name")
    function = {"arguments": ""} if name is None else {"name": name, "arguments": ""}
    return {key: call[key] for key in ("index", "id", "type") if key in call} | {"function": function}


def _texts(holder: Mapping[str, Any]) -> list[tuple[tuple[str, int], str]]:
    """Every text of a message, delta or completion choice, with its place. A call without a number has its position."""
    found = [((name, 0), holder[name]) for name in (*TEXTS, "text") if isinstance(holder.get(name), str)]
    for position, call in enumerate(holder.get("tool_calls") or []):
        arguments = (call.get("function") or {}).get("arguments")
        if isinstance(arguments, str):
            found.append((("tool_calls", call.get("index", position)), arguments))
    return found


def _get(holder: Mapping[str, Any], place: tuple[str, int]) -> str | None:
    return next((text for where, text in _texts(holder) if where == place), None)


def _put(holder: dict[str, Any], place: tuple[str, int], text: str) -> None:
    name, number = place
    if name != "tool_calls":
        holder[name] = text
        return
    for position, call in enumerate(holder.get("tool_calls") or []):
        if call.get("index", position) == number:
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
                data = line.removeprefix("data:").strip()
                if data == line.strip() or data == "[DONE]":
                    continue
                event = json.loads(data)
                if "error" in event:
                    yield _event({"error": {"message": "The upstream server failed.", "type": "server_error"}})
                    break
                shown = await beside(_guarded, event, choices, ended, guard, vault, prompt)
                if shown is not None:
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
        holder = _frame(given) if chat else {}
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
    return _known(event, shown)
