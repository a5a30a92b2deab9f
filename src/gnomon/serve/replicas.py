"""Replicas of one server as Ray actors: same model, same profile, same bits; one that dies is started again.

Each actor runs the whole server (serve/app.py) on an address of its own, open only to the router's key. Knows how
replicas live; which of them answers a request is router.py's business.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import time
from collections.abc import Mapping
from typing import Any

from gnomon.cluster import import_ray, start_ray
from gnomon.errors import NotReady
from gnomon.recipe import ServeOptions

log = logging.getLogger("gnomon.serve")
CHECK_SECONDS = 1.0
START_SECONDS = 600.0


def serve_replica(reference: str | None, loading: Mapping[str, Any], options: ServeOptions) -> tuple[str, str]:
    """Load, serve on a thread of this process -> (address, fingerprint). Runs inside an actor."""
    import uvicorn

    from gnomon.loading import load
    from gnomon.serve.app import create_app
    from gnomon.serve.run import address, bind, http_config

    listener = bind(options)
    model = load(reference, **loading)
    app = create_app({options.served_name or model.name: model}, options)
    server = uvicorn.Server(http_config(app))
    threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return address(listener), model.fingerprint


class RayFleet:
    """Implements `Fleet` over Ray actors. address: a running cluster's, or None for one on this machine."""

    def __init__(
        self,
        count: int,
        reference: str | None,
        loading: Mapping[str, Any],
        options: ServeOptions,
        *,
        address: str | None = None,
    ) -> None:
        ray = _ray()
        self.key = secrets.token_hex(16)
        self.fingerprints: dict[int, str] = {}
        self._alive: dict[int, str] = {}
        self._lock = threading.Lock()
        self._closing = threading.Event()
        os.environ.setdefault("RAY_worker_niceness", "0")  # the replicas are the server, not background work
        hint = "A busy machine is slow: try again."
        self._started_ray = start_ray(ray, address, hint=hint, num_cpus=max(count, os.cpu_count() or 1))
        own = options.model_copy(update={"host": "127.0.0.1", "port": 0, "api_key": self.key, "admin_key": None})
        if address:
            own = own.model_copy(update={"host": "0.0.0.0"})
        actor = ray.remote(num_cpus=1, max_restarts=-1, max_concurrency=4)(_Replica)
        self.actors = [actor.remote(reference, dict(loading), own.model_dump()) for _ in range(count)]
        self._watchers = [threading.Thread(target=self._watch, args=(number,), daemon=True) for number in range(count)]
        for watcher in self._watchers:
            watcher.start()

    def wait(self) -> None:
        """Until every replica serves. Raises NotReady, and whatever a replica's loading raised."""
        deadline = time.monotonic() + START_SECONDS
        while len(self.addresses()) < len(self.actors):
            if self._error is not None:
                raise self._error
            if time.monotonic() > deadline:
                raise NotReady(f"{len(self.addresses())} of {len(self.actors)} replicas started.")
            time.sleep(0.05)
        if len(set(self.fingerprints.values())) != 1:
            raise NotReady(f"The replicas' fingerprints differ: {sorted(set(self.fingerprints.values()))}.")

    def addresses(self) -> dict[int, str]:
        with self._lock:
            return dict(self._alive)

    def failed(self, number: int, address: str) -> None:
        with self._lock:
            if self._alive.get(number) == address:
                del self._alive[number]

    def process_ids(self) -> list[int]:
        """Of the actors, in order: what a test kills."""
        ids: list[int] = _ray().get([actor.process_id.remote() for actor in self.actors])
        return ids

    def close(self) -> None:
        self._closing.set()
        ray = _ray()
        for actor in self.actors:
            ray.kill(actor)
        if self._started_ray:
            ray.shutdown()

    _error: Exception | None = None

    def _watch(self, number: int) -> None:
        """Ask one replica who it is, again and again; one that restarts comes back under a new address."""
        ray = _ray()
        while not self._closing.is_set():
            try:
                address, fingerprint = ray.get(self.actors[number].whereabouts.remote())
            except ray.exceptions.RayTaskError as error:  # its own loading failed: it will not get better
                self._error = error.cause if isinstance(error.cause, Exception) else error
                return
            except ray.exceptions.RayError as error:
                if number not in self.fingerprints and isinstance(error, ray.exceptions.ActorDiedError):
                    self._error = NotReady(f"Replica {number} could not start: {error}")
                    return
                with self._lock:
                    self._alive.pop(number, None)
            else:
                with self._lock:
                    self.fingerprints[number] = fingerprint
                    self._alive[number] = address
            self._closing.wait(CHECK_SECONDS)


class _Replica:
    """The actor. It loads on its first question, so that what loading raises reaches the asker."""

    def __init__(self, reference: str | None, loading: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        self.arguments = (reference, loading, ServeOptions(**options))
        self.lock = threading.Lock()
        self.found: tuple[str, str] | None = None

    def whereabouts(self) -> tuple[str, str]:
        with self.lock:
            if self.found is None:
                self.found = serve_replica(*self.arguments)
                host = self.arguments[2].host
                if host == "0.0.0.0":
                    own = _ray().util.get_node_ip_address()
                    self.found = (self.found[0].replace(host, own), self.found[1])
            return self.found

    def process_id(self) -> int:
        return os.getpid()


def _ray() -> Any:
    return import_ray("--replicas")
