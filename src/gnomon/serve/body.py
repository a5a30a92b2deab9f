"""Reading a JSON body: size-limited by the gate, parsed here with an error that says where it breaks."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request
from pydantic import BaseModel

from gnomon.errors import UsageError


async def read_json(request: Request) -> Any:
    """The body's value. Raises UsageError for bytes that are not UTF-8 or not JSON, or nested too deep."""
    raw = await request.body()
    try:
        return json.loads(raw.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise UsageError(f"The body is not valid UTF-8 at byte {error.start}.") from None
    except json.JSONDecodeError as error:
        raise UsageError(f"The body is not valid JSON: {error.msg} at character {error.pos}.") from None
    except RecursionError:
        raise UsageError("The body is nested too deep.") from None


def _refuse_constant(name: str) -> Any:
    raise UsageError(f"The body holds {name}, which is not JSON.")


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The OpenAPI description of a body that a route reads by itself."""
    return {
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {"schema": kind.model_json_schema(ref_template="#/components/schemas/{model}")}
            },
        }
    }
