"""The guard over HTTP: /v1/moderations in OpenAI's shape, /guard/scan, and sessions that guard other people's streams.

A session joins the fragments of one text: send them in order, get what may be shown and the verdict on the joined
text. Sessions live in this process, belong to the caller's key, and are forgotten after a while.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field

from gnomon.capability import Origin
from gnomon.errors import Overloaded, UsageError
from gnomon.guard.guard import Guard
from gnomon.guard.policy import GuardOptions
from gnomon.guard.scanners.moderation import CATEGORIES, categories
from gnomon.guard.session import Session
from gnomon.registry import Registry
from gnomon.serve.body import read_json, schema
from gnomon.serve.protocol import parse
from gnomon.serve.state import state_of
from gnomon.serve.waiting import beside

router = APIRouter()
FLAGGED = 0.5
MOST_SESSIONS = 4096
FORGET_SECONDS = 900.0
RISK_LEVELS = ((0.9, "high"), (0.6, "medium"), (0.01, "low"))


class ModerationBody(BaseModel):
    """POST /v1/moderations."""

    model_config = ConfigDict(extra="forbid")

    input: str | list[Any]
    model: str | None = None


class ScanBody(BaseModel):
    """POST /guard/scan."""

    model_config = ConfigDict(extra="forbid")

    text: str
    direction: str = Field(default="output", pattern="^(input|output)$")
    guard: Any = None


class FragmentBody(BaseModel):
    """POST /guard/sessions/{id}: one more fragment of the session's text."""

    model_config = ConfigDict(extra="forbid")

    content: str = ""
    done: bool = False
    seq: int | None = Field(
        default=None, ge=0, description="Number of this fragment; a repeated one is not added twice."
    )
    direction: str = Field(default="output", pattern="^(input|output)$")
    guard: Any = None


class StreamBody(FragmentBody):
    """POST /v1/moderate/stream: the same with the session's id in the body."""

    sessionId: str = Field(min_length=1, max_length=256)


@dataclass
class Kept:
    """A session with what its last answer was."""

    session: Session
    used: float
    seq: int = -1
    answer: dict[str, Any] = field(default_factory=dict)
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Sessions:
    """The running sessions, by caller and id; the longest unused are forgotten."""

    def __init__(self) -> None:
        self.kept: OrderedDict[tuple[str, str], Kept] = OrderedDict()

    def get(self, key: tuple[str, str], make: Any) -> Kept:
        now = time.monotonic()
        while self.kept and next(iter(self.kept.values())).used < now - FORGET_SECONDS:
            self.kept.popitem(last=False)
        if key not in self.kept:
            if len(self.kept) >= MOST_SESSIONS:
                raise Overloaded(f"{MOST_SESSIONS} guard sessions are open; finish some with `done: true`.")
            self.kept[key] = Kept(make(), now)
        self.kept.move_to_end(key)
        self.kept[key].used = now
        return self.kept[key]


def _sessions(request: Request) -> Sessions:
    state = state_of(request)
    if not hasattr(state, "guard_sessions"):
        state.guard_sessions = Sessions()  # type: ignore[attr-defined]
    found: Sessions = state.guard_sessions  # type: ignore[attr-defined]
    return found


def _guard(request: Request, asked: Any) -> Guard:
    """The operator's guard (of the first model that has one; else the default pack) with what the request adds."""
    models = state_of(request).models.values()
    operator = next((model.defaults["guard"] for model in models if model.defaults.get("guard") is not None), None)
    if operator is None and asked is None:
        return _default()
    given = {} if asked is None else {"guard": asked}
    parsed = Registry.installed().parse(given, Origin.REQUEST, {} if operator is None else {"guard": operator})
    options = parsed["guard"]
    assert isinstance(options, GuardOptions)
    return Guard.of(options)


def _default() -> Guard:
    global _default_guard
    if _default_guard is None:
        _default_guard = Guard()
    return _default_guard


_default_guard: Guard | None = None


@router.post("/v1/moderations", openapi_extra=schema(ModerationBody))
async def moderations(request: Request) -> Response:
    """OpenAI's moderation shape. The categories come from word lists that were not measured; `guard` from the rules."""
    body = parse(ModerationBody, await read_json(request))
    guard = await beside(_guard, request, None)
    results = [await beside(_moderated, guard, text) for text in _texts(body.input)]
    answer = {"id": f"modr-{secrets.token_hex(12)}", "model": body.model or "gnomon-guard", "results": results}
    return JSONResponse(answer)


def _texts(given: str | list[Any]) -> list[str]:
    if isinstance(given, str):
        return [given]
    if not given:
        raise UsageError("`input` is empty.", param="input")
    if all(isinstance(one, str) for one in given):
        return list(given)
    parts = []
    for place, part in enumerate(given):
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise UsageError("Only texts can be moderated.", param=f"input[{place}]")
        parts.append(part["text"])
    return ["\n".join(parts)]


def _moderated(guard: Guard, text: str) -> dict[str, Any]:
    scores = categories(text)
    result = guard.scan(text)
    return {
        "flagged": not result.valid or any(score >= FLAGGED for score in scores.values()),
        "categories": {name: scores[name] >= FLAGGED for name in CATEGORIES},
        "category_scores": {name: round(scores[name], 4) for name in CATEGORIES},
        "category_applied_input_types": {name: ["text"] for name in CATEGORIES},
        "guard": {"verdict": result.verdict, "findings": [finding.as_dict() for finding in result.findings]},
        "unvalidated": True,
    }


@router.post("/guard/scan", openapi_extra=schema(ScanBody))
async def scan(request: Request) -> Response:
    """A whole text under the server's guard, with what the request adds."""
    body = parse(ScanBody, await read_json(request))
    guard = await beside(_guard, request, body.guard)
    result = await beside(guard.scan, body.text, body.direction)
    findings = [finding.as_dict() for finding in result.findings]
    return JSONResponse(
        {
            "verdict": result.verdict,
            "valid": result.valid,
            "risk": result.risk,
            "text": result.text,
            "findings": findings,
        }
    )


@router.post("/guard/sessions/{id}", openapi_extra=schema(FragmentBody))
async def fragment(request: Request, id: str) -> Response:
    """Add a fragment; `text` is what may be shown now. `done: true` ends the session."""
    return JSONResponse(await _fragment(request, id, parse(FragmentBody, await read_json(request))))


@router.delete("/guard/sessions/{id}")
async def forget(request: Request, id: str) -> Response:
    """Forget a session and what it held."""
    found = _sessions(request).kept.pop((_caller(request), id), None)
    return JSONResponse({"id": id, "deleted": found is not None})


@router.post("/v1/moderate/stream", openapi_extra=schema(StreamBody))
async def stream(request: Request) -> Response:
    """The same, with the names that Aliyun's service uses: `sessionId`, `labels`, `riskLevel`."""
    body = parse(StreamBody, await read_json(request))
    answer = await _fragment(request, body.sessionId, body)
    return JSONResponse(
        {
            "sessionId": answer["id"],
            "labels": ",".join(answer["labels"]),
            "riskLevel": answer["risk_level"],
            "spans": [[f["start"], f["end"]] for f in answer["findings"]],
            "assembledLength": answer["length"],
            "content": answer["text"],
        }
    )


async def _fragment(request: Request, id: str, body: FragmentBody) -> dict[str, Any]:
    key = (_caller(request), id)
    sessions = _sessions(request)
    guard = await beside(_guard, request, body.guard)
    kept = sessions.get(key, lambda: guard.session(body.direction))  # type: ignore[arg-type]
    async with kept.lock:
        if body.seq is not None and body.seq <= kept.seq:
            if body.seq == kept.seq:
                return kept.answer  # sent again: the same answer
            raise UsageError(f"Fragment {body.seq} comes after {kept.seq}.", param="seq")
        if body.seq is not None and body.seq != kept.seq + 1:
            raise UsageError(f"Fragment {kept.seq + 1} is missing.", param="seq")
        text = await beside(kept.session.push, body.content)
        if body.done:
            text += await beside(kept.session.finish)
            sessions.kept.pop(key, None)
        kept.seq = kept.seq if body.seq is None else body.seq
        kept.answer = _answer(id, kept.session, text, body.done)
        return kept.answer


def _caller(request: Request) -> str:
    return hashlib.sha256(request.headers.get("authorization", "").encode()).hexdigest()


def _answer(id: str, session: Session, text: str, done: bool) -> dict[str, Any]:
    findings = session.findings
    worst = max((f.score * (1.0 if f.action != "flag" else 0.6) for f in findings), default=0.0)
    return {
        "id": id,
        "text": text,
        "verdict": session.verdict,
        "risk_level": next((name for bar, name in RISK_LEVELS if worst >= bar), "none"),
        "labels": sorted({finding.rule for finding in findings}),
        "findings": [finding.as_dict() for finding in findings],
        "length": session.length,
        "held": session.held,
        "done": done,
    }
