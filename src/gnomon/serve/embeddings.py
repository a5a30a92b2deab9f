"""POST /v1/embeddings: sentence vectors, as floats or base64 of little-endian float32."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

from fastapi import APIRouter, Request

from gnomon.errors import UsageError
from gnomon.serve.body import read_json, schema
from gnomon.serve.protocol import EmbeddingBody, parse
from gnomon.serve.state import state_of

router = APIRouter()
MOST_TEXTS = 2048


@router.post("/v1/embeddings", openapi_extra=schema(EmbeddingBody))
async def embeddings(request: Request) -> dict[str, Any]:
    """Embed one text or several."""
    body = parse(EmbeddingBody, await read_json(request))
    state = state_of(request)
    model = state.model(body.model)
    texts = [body.input] if isinstance(body.input, str) else body.input
    if len(texts) > MOST_TEXTS:
        raise UsageError(f"`input` has {len(texts)} texts; at most {MOST_TEXTS} are taken.", param="input")
    state.check_admission(model, 0, [])
    vectors = await asyncio.to_thread(model.embed, texts)
    size = vectors.shape[-1]
    if body.dimensions is not None and body.dimensions != size:
        raise UsageError(
            f"`dimensions`: `{body.model}` gives {size} numbers, not {body.dimensions}.", param="dimensions"
        )

    def encoded(row: Any) -> Any:
        return (
            base64.b64encode(row.numpy().astype("<f4").tobytes()).decode()
            if body.encoding_format == "base64"
            else row.tolist()
        )

    data = [{"object": "embedding", "index": i, "embedding": encoded(row)} for i, row in enumerate(vectors)]
    count = sum(await asyncio.to_thread(model.count_tokens, texts))
    usage = {"prompt_tokens": count, "total_tokens": count}
    return {"object": "list", "data": data, "model": body.model, "usage": usage}
