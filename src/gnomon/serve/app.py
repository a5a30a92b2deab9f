"""The server: models in, an ASGI application out.

Assembles the gate, the OpenAI-compatible routes, health and metrics, the studio page and the routes of installed
capabilities. Decoding runs on the engine's own thread; nothing here blocks the event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline
from starlette.middleware.cors import CORSMiddleware
from starlette.staticfiles import StaticFiles

from gnomon.capability import load_attribute
from gnomon.grammar.cache import compile_apart
from gnomon.grammar.worker import Worker
from gnomon.model import Model
from gnomon.recipe import ServeOptions
from gnomon.registry import Registry
from gnomon.serve import chat, completions, embeddings, errors, health
from gnomon.serve.gate import Gate, GatePolicy, allowed_hosts
from gnomon.serve.state import ServerState
from gnomon.version import __version__

STUDIO = Path(__file__).parent / "studio"


def create_app(models: Mapping[str, Model], options: ServeOptions | None = None) -> FastAPI:
    """An application serving these models under these names; the first is the default of the studio page."""
    options = options or ServeOptions()
    state = ServerState(dict(models), options)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker = Worker(options.grammar_seconds)
        compile_apart(worker)
        state.ready = True
        testing = asyncio.create_task(asyncio.to_thread(state.certify))
        yield
        state.ready = False
        await asyncio.gather(testing, return_exceptions=True)
        await asyncio.to_thread(state.close)
        compile_apart(None)
        worker.close()

    app: FastAPI = FastAPIOffline(
        title="gnomon", version=__version__, redoc_url=None, lifespan=lifespan, description=DESCRIPTION
    )
    app.state.gnomon = state
    errors.install(app)
    for room in (chat, completions, embeddings, health):
        app.include_router(room.router)
    for capability in Registry.installed().capabilities.values():
        if capability.routes:
            app.include_router(load_attribute(capability.routes))
    app.mount("/studio", StaticFiles(directory=STUDIO), name="studio")
    app.add_middleware(
        Gate,
        policy=GatePolicy(
            hosts=allowed_hosts(options.host, options.allowed_hosts),
            origins=tuple(options.cors_origins),
            api_key=options.api_key,
            admin_key=options.admin_key,
            max_body_bytes=options.max_body_bytes,
        ),
    )
    if options.cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=options.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    return app


DESCRIPTION = """OpenAI-compatible API of gnomon: every answer carries the fingerprint of the numbers that made it."""
