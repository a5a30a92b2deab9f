"""A real server in this process: uvicorn on a free port, on a thread."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from gnomon.model import Model
from gnomon.recipe import ServeOptions
from gnomon.serve.app import create_app
from gnomon.serve.run import address, bind, http_config


@contextmanager
def serving(models: dict[str, Model], **options: object) -> Iterator[str]:
    """Yields the base address. The models stay open afterwards."""
    settings = ServeOptions(port=0, **options)  # type: ignore[arg-type]
    listener = bind(settings)
    app = create_app(models, settings)
    app.state.gnomon.close = lambda: None
    server = uvicorn.Server(http_config(app))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
