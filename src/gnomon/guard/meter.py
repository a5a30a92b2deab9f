"""What guarding costs and does, counted for the whole process; the server's /metrics reads it. No text, no secrets."""

from __future__ import annotations

import threading
from collections import Counter

HELD_BUCKETS = (0, 8, 16, 32, 64, 128, 256, 1024, 4096)
SECONDS_BUCKETS = (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 1e-2, 1e-1, 1.0)


class Meter:
    """Counters: characters held after each piece, seconds added by each piece, findings by rule and action."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.held: Counter[float] = Counter()
        self.seconds: Counter[float] = Counter()
        self.sums = {"held": 0.0, "seconds": 0.0}
        self.findings: Counter[tuple[str, str]] = Counter()
        self.aborts = 0
        self.rollbacks = 0

    def piece(self, held: int, seconds: float) -> None:
        with self._lock:
            self.held[_bucket(held, HELD_BUCKETS)] += 1
            self.seconds[_bucket(seconds, SECONDS_BUCKETS)] += 1
            self.sums["held"] += held
            self.sums["seconds"] += seconds

    def found(self, rule: str, action: str) -> None:
        with self._lock:
            self.findings[(rule, action)] += 1
            self.aborts += action == "block"

    def went_back(self) -> None:
        with self._lock:
            self.rollbacks += 1


def _bucket(value: float, buckets: tuple[float, ...]) -> float:
    return next((limit for limit in buckets if value <= limit), float("inf"))


METER = Meter()
