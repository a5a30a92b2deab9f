"""Completions from the engine, with the log-probability of every token drawn, the end token included.

Token ids in and out. Each prompt has a seed of its own made from the run's seed, the step and its place.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

from gnomon.engine.request import Decision, Finished, Request, SamplingParams, TokenEvent
from gnomon.engine.worker import EngineWorker


@dataclass
class Rollout:
    """One completion. token_ids ends with the end token when there was one; logprobs are the sampler's own."""

    prompt_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False
    """Ended by itself, not by the limit."""

    @property
    def ids(self) -> list[int]:
        return self.prompt_ids + self.token_ids


def seed_of(seed: int, step: int, place: int) -> int:
    """64 bits from (run, step, place of the prompt in the step)."""
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    return int.from_bytes(digest[:8], "little")


def rollouts(
    worker: EngineWorker, prompts: Sequence[list[int]], each: int, params: Sequence[SamplingParams]
) -> list[Rollout]:
    """`each` completions of every prompt, a prompt's own side by side. Raises what the engine raises."""
    results, waits, errors = [], [], []
    for place, (prompt, sampling) in enumerate(zip(prompts, params, strict=True)):
        for stream in range(each):
            rollout, done = Rollout(list(prompt)), threading.Event()

            def on_token(event: TokenEvent, rollout: Rollout = rollout) -> Decision:
                assert event.logprob is not None, "asked for"
                rollout.token_ids.append(event.token_id)
                rollout.logprobs.append(event.logprob)
                rollout.finished = event.ends == "stop"
                return Decision.CONTINUE

            def on_finish(finished: Finished, done: threading.Event = done) -> None:
                if finished.error is not None:
                    errors.append(finished.error)
                done.set()

            name = f"rollout {place}/{stream}"
            worker.submit(Request(name, list(prompt), sampling, stream, on_token=on_token, on_finish=on_finish))
            results.append(rollout)
            waits.append(done)
    for done in waits:
        done.wait()
    if errors:
        raise errors[0]
    return results
