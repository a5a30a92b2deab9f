"""`gnomon serve --replicas N`: a router in this process, Ray actors behind it."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from gnomon.cli import common
from gnomon.config import Settings
from gnomon.errors import UsageError


def run_replicas(settings: Settings, started: float) -> None:
    """Start the replicas, then route until a signal."""
    import uvicorn

    from gnomon.kernels.threads import available_threads
    from gnomon.recipe import read_template
    from gnomon.serve.gate import Gate, GatePolicy, allowed_hosts
    from gnomon.serve.replicas import RayFleet
    from gnomon.serve.router import create_router
    from gnomon.serve.run import address, bind, http_config

    recipe, options = settings.recipe, settings.recipe.serve
    for given, flag in ((options.admin_key, "--admin-key"), (options.embeddings, "--embeddings")):
        if given:
            raise UsageError(f"{flag} does not work with --replicas.", hint="Serve from one process.", param=flag)
    if recipe.merge is not None:
        raise UsageError(
            "A recipe's `merge:` does not work with --replicas.",
            hint="Name a merge file as its `model`.",
            param="merge",
        )
    listener = bind(options)
    threads = recipe.threads or max(1, available_threads() // options.replicas)
    loading = {
        "profile": recipe.profile,
        "threads": threads,
        "device": recipe.device,
        "determinism": recipe.determinism,
        "chat_template": read_template(Path(recipe.chat_template)) if recipe.chat_template else None,
        "defaults": settings.options,
        **{key: getattr(recipe.engine, key) for key in common.ENGINE_KEYS},
    }
    name = options.served_name or recipe.name
    own = options.model_copy(update={"replicas": 1, "served_name": name})
    fleet = RayFleet(options.replicas, recipe.model, loading, own, address=options.ray_address)
    try:
        fleet.wait()
        app = create_router(fleet)
        app.add_middleware(
            Gate,
            policy=GatePolicy(
                hosts=allowed_hosts(options.host, options.allowed_hosts),
                origins=tuple(options.cors_origins),
                api_key=options.api_key,
                max_body_bytes=options.max_body_bytes,
            ),
        )
        print(
            f"  {options.replicas} replicas of {threads} thread(s)  {next(iter(fleet.fingerprints.values()))}\n"
            f"  API     {address(listener)}/v1\n"
            f"Ready in {time.monotonic() - started:.1f} s. Ctrl-C stops.",
            file=sys.stderr,
        )
        server = uvicorn.Server(http_config(app, grace_seconds=options.grace_seconds))
        with suppress(KeyboardInterrupt):
            asyncio.run(server.serve(sockets=[listener]))
    finally:
        with suppress(ValueError):
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # closing is not interrupted
        fleet.close()
