"""What all routes share: the models by name, the limits, and who may be admitted.

A request enters through `admit`, which answers 404 for an unknown model, 503 while loading or shutting down, and 429
when the queue is full. Knows nothing of HTTP.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

from fastapi import Request

from gnomon.engine.certificate import Certificate
from gnomon.errors import ContextLengthExceeded, ModelNotFound, NotReady, Overloaded, UsageError
from gnomon.generation import Chunk
from gnomon.model import Model
from gnomon.recipe import ServeOptions
from gnomon.registry import nearest
from gnomon.serve.metrics import Metrics
from gnomon.submission import Submission

log = logging.getLogger("gnomon.serve")


class ServerState:
    """One server's models and counters. Lives on the event loop's thread."""

    def __init__(self, models: dict[str, Model], options: ServeOptions) -> None:
        self.models = models
        self.options = options
        self.ready = False
        self.draining = False
        self.certificates: dict[str, Certificate] = {}
        self.active: set[Submission] = set()
        self.created = int(time.time())
        self.metrics = Metrics(self)

    def certify(self) -> None:
        """Test every model on this machine; one that fails is not served (GNOMON_UNCERTIFIED=1: all the same)."""
        for name, model in self.models.items():
            if model.encoder is not None:
                continue
            certificate = self.certificates[name] = model.certificate()
            if certificate.covered and not certificate.passed:
                failed = [f"{probe.name}: {probe.detail}" for probe in certificate.probes if not probe.passed]
                log.error("`%s` failed its self-test on this machine: %s", name, "; ".join(failed))

    def _check_certificate(self, model: Model) -> None:
        certificate = next((self.certificates.get(name) for name, one in self.models.items() if one is model), None)
        if certificate is None or not certificate.covered or certificate.passed:
            return
        if os.environ.get("GNOMON_UNCERTIFIED") != "1":
            raise NotReady(
                f"`{model.name}` failed its self-test on this machine, so its output would not be reproducible.",
                hint="See GET /v1/determinism. GNOMON_UNCERTIFIED=1 serves it all the same.",
            )

    def model(self, name: str) -> Model:
        """The model of that name. A request never loads anything new."""
        if name not in self.models:
            raise ModelNotFound(
                f"The model `{name}` is not served here.", hint=nearest(name, self.models), param="model"
            )
        return self.models[name]

    def check_admission(self, model: Model, choices: int, prompt_tokens: list[int]) -> None:
        """Refuse what does not fit now (429, 503) or ever (400)."""
        if self.draining or not self.ready:
            raise NotReady("The server is shutting down." if self.draining else "The server is starting.")
        self._check_certificate(model)
        if choices > self.options.max_choices:
            raise UsageError(
                f"{choices} choices asked for; this server gives at most {self.options.max_choices} per request.",
                param="n",
            )
        limit = self.options.max_prompt_tokens
        for count in prompt_tokens:
            if limit is not None and count > limit:
                raise ContextLengthExceeded(
                    f"The prompt has {count} tokens; this server takes at most {limit}.", param="messages"
                )
        waiting = model.stats().waiting
        if waiting + choices > self.options.max_waiting:
            self.metrics.rejected.inc()
            raise Overloaded(f"{waiting} requests are waiting already; try again shortly.")

    @contextmanager
    def running(self, submissions: list[Submission]) -> Iterator[None]:
        """Keep submissions in sight while they run; whatever ends the block cancels what still runs."""
        self.active.update(submissions)
        try:
            yield
        finally:
            for submission in submissions:
                submission.cancel()
            self.active.difference_update(submissions)

    async def chunks(self, request: Request, submission: Submission) -> AsyncIterator[Chunk]:
        """A submission's chunks, timed for the metrics; ends (and cancels) when the client has gone."""
        started = previous = time.monotonic()
        first = True
        async for chunk in submission.chunks():
            now = time.monotonic()
            self.metrics.chunk(chunk, now - started if first else None, now - previous)
            if chunk.token_ids:
                first, previous = False, now
            if chunk.finish_reason is not None:
                self.metrics.finished(chunk, now - started)
            yield chunk

    def cancel_all(self) -> None:
        for submission in list(self.active):
            submission.cancel()

    def close(self) -> None:
        for model in self.models.values():
            model.close()


def state_of(request: Request) -> ServerState:
    state: ServerState = request.app.state.gnomon
    return state
