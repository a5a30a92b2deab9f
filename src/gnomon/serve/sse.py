"""Server-sent events: an async iterator of JSON values in, an HTTP stream out that ends with [DONE].

A client that leaves ends the iterator at once, which cancels its decoding.
"""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.responses import StreamingResponse

from gnomon.errors import GnomonError
from gnomon.serve import errors


def stream(events: AsyncGenerator[Mapping[str, Any], None], headers: Mapping[str, str]) -> StreamingResponse:
    """The response. An error in the middle becomes an error event; the stream still ends properly."""

    async def lines() -> AsyncGenerator[str, None]:
        async with aclosing(events):
            try:
                async for event in events:
                    yield f"data: {json.dumps(event, ensure_ascii=False, separators=(',', ':'))}\n\n"
            except GnomonError as error:
                yield errors.event(error)
        yield "data: [DONE]\n\n"

    return StreamingResponse(
        lines(),
        media_type="text/event-stream",
        headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **headers},
    )
