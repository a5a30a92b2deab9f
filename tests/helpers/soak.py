"""Many streaming clients that leave at random moments, against a server of this machine. Bounded in time and number."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field
from typing import Any

import httpx


@dataclass
class SoakResult:
    """What the clients saw."""

    finished: int = 0
    left_early: int = 0
    refused: int = 0
    failed: list[str] = field(default_factory=list)
    health_seconds: list[float] = field(default_factory=list)

    def plus(self, other: SoakResult) -> SoakResult:
        return SoakResult(
            self.finished + other.finished,
            self.left_early + other.left_early,
            self.refused + other.refused,
            self.failed + other.failed,
            self.health_seconds + other.health_seconds,
        )


async def soak(url: str, model: str, *, clients: int, seconds: float, most_tokens: int = 24) -> SoakResult:
    """Each client asks, reads, and in half of the cases leaves in the middle; a prober times /healthz meanwhile."""
    result = SoakResult()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def client(number: int) -> None:
            rng = random.Random(number)
            while time.monotonic() < end:
                await one(rng)

        async def one(rng: random.Random) -> None:
            body: dict[str, Any] = {
                "model": model,
                "messages": [{"role": "user", "content": "word " * rng.randint(1, 60)}],
                "stream": True,
                "max_tokens": rng.randint(1, most_tokens),
                "temperature": rng.choice([0, 0.9]),
            }
            leave_after = rng.randint(1, 8) if rng.random() < 0.5 else None
            try:
                async with http.stream("POST", "/v1/chat/completions", json=body) as reply:
                    if reply.status_code in (429, 503):
                        result.refused += 1
                        await asyncio.sleep(0.2)
                        return
                    seen = 0
                    last = ""
                    async for line in reply.aiter_lines():
                        last = line or last
                        seen += 1
                        if leave_after is not None and seen > leave_after:
                            result.left_early += 1
                            return
                    if last != "data: [DONE]":
                        result.failed.append(last[:200])
                    result.finished += 1
            except httpx.HTTPError as error:
                result.failed.append(repr(error))

        async def prober() -> None:
            while time.monotonic() < end:
                started = time.monotonic()
                await http.get("/healthz")
                result.health_seconds.append(time.monotonic() - started)
                await asyncio.sleep(0.25)

        await asyncio.gather(prober(), *(client(number) for number in range(clients)))
    return result
