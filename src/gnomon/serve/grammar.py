"""POST /v1/grammar/check: what becomes of each keyword of a schema, and the shortest text, before generating."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request

from gnomon.capability import Origin
from gnomon.errors import UsageError
from gnomon.grammar.options import GrammarOptions
from gnomon.registry import Registry
from gnomon.serve.body import read_json, schema

router = APIRouter()


@router.post("/v1/grammar/check", openapi_extra=schema(GrammarOptions))
async def check(request: Request) -> dict[str, Any]:
    """The body is the `grammar` option of a request; what is wrong is the error that generating would give."""
    body = await read_json(request)
    if body is None:
        raise UsageError("The body is the `grammar` option: an object, or a GBNF grammar as text.")
    return await asyncio.to_thread(_checked, body)


def _checked(body: Any) -> dict[str, Any]:
    options = Registry.installed().parse({"grammar": body}, Origin.REQUEST)["grammar"]
    assert isinstance(options, GrammarOptions)
    grammar = options.grammar()
    return {"object": "grammar.report", **grammar.report.as_dict(), "shortest": grammar.known_shortest()}
