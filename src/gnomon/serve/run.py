"""Running the server: the socket, the banner, and a shutdown that ends streams properly.

The socket is bound before any model is loaded, so that a port in use is known at once.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

import uvicorn
from fastapi import FastAPI

from gnomon.errors import UsageError
from gnomon.recipe import ServeOptions
from gnomon.serve.gate import LOOPBACK
from gnomon.serve.state import ServerState

log = logging.getLogger("gnomon.serve")


def bind(options: ServeOptions) -> socket.socket:
    """The listening socket. Raises UsageError: port in use, bad address, or a public bind without a key."""
    if options.host not in LOOPBACK and options.api_key is None and options.auth:
        raise UsageError(
            f"Binding to {options.host} lets others in, and no API key is set.",
            hint="Give --api-key KEY, or say --no-auth if that is meant.",
            param="serve.host",
        )
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((options.host, options.port))
    except (OSError, OverflowError) as error:
        listener.close()
        if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"Port {options.port} on {options.host} is in use.",
                hint=f"Stop the other server, or choose another: --port {options.port + 1}",
                param="serve.port",
            ) from None
        raise UsageError(f"Cannot listen on {options.host}:{options.port}: {error}.", param="serve.host") from None
    listener.listen(1024)
    listener.setblocking(False)
    return listener


def address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def run(app: FastAPI, listener: socket.socket, options: ServeOptions, on_ready: Callable[[], None]) -> None:
    """Serve until a signal; then stop admitting, let streams finish for grace_seconds, and end the rest properly."""
    server = _Server(http_config(app, grace_seconds=options.grace_seconds))
    asyncio.run(_serve(server, app.state.gnomon, listener, options.grace_seconds, on_ready))


def http_config(app: FastAPI, *, grace_seconds: float = 0.0) -> uvicorn.Config:
    """How every server of ours speaks HTTP.

    An idle connection is kept well beyond the 5 s after which clients let go of it: when both let go at the same time,
    a client's next request meets a dead connection.
    """
    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(grace_seconds) + 2,
        server_header=False,
    )


class _Server(uvicorn.Server):
    """Signals are ours: the first drains, the second stops at once."""

    def install_signal_handlers(self) -> None:
        """Handled in _serve."""

    def capture_signals(self):  # type: ignore[no-untyped-def]
        from contextlib import nullcontext

        return nullcontext()


async def _serve(
    server: _Server, state: ServerState, listener: socket.socket, grace: float, on_ready: Callable[[], None]
) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal() -> None:
        if stop.is_set():
            state.cancel_all()
            server.force_exit = True
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        with suppress(NotImplementedError):
            loop.add_signal_handler(number, on_signal)
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        on_ready()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not serving.done():
        state.draining = True
        log.info("stopping: %d requests finish within %.0f s", len(state.active), grace)
        await _drain(state, grace)
        server.should_exit = True
    await serving


async def _drain(state: ServerState, grace: float) -> None:
    """Let running requests finish; those that do not are cancelled, which ends their streams with [DONE]."""
    deadline = asyncio.get_running_loop().time() + grace
    while state.active and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    state.cancel_all()
