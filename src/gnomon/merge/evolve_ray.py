"""A generation's merges measured at once, as Ray tasks, one processor each (extra `cluster`).

Every task opens the models and merges by itself; a merge has the same bits wherever it is made, so a search finds the
same with and without Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from gnomon.cluster import import_ray, start_ray

Begin = Callable[[Sequence[Mapping[str, Any]]], list[Callable[[], float]]]
"""Candidates -> what waits for the loss of each."""


@contextmanager
def begun_on_ray(measure: Callable[[Mapping[str, Any]], float], address: str) -> Iterator[Begin]:
    """measure: a picklable function. address: of a running cluster ("auto" finds it), or "local" for one of its own.

    Raises MissingExtra, and NotReady when Ray does not start.
    """
    ray = import_ray("gnomon merge evolve --ray")
    hint = "Without --ray the search runs in this process, and finds the same."
    started = start_ray(ray, None if address == "local" else address, hint=hint)

    def measured(candidate: Mapping[str, Any]) -> float:
        return measure(candidate)

    task = ray.remote(num_cpus=1)(measured)

    def begin(candidates: Sequence[Mapping[str, Any]]) -> list[Callable[[], float]]:
        asked = [task.remote(candidate) for candidate in candidates]
        return [lambda reference=reference: float(_result(ray, reference)) for reference in asked]  # type: ignore[misc]

    try:
        yield begin
    finally:
        if started:
            ray.shutdown()


def _result(ray: Any, reference: Any) -> Any:
    """What a task returned; its own error, rather than Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
