"""200 streaming clients that leave at random: no page leaks, no request hangs, memory stays flat."""

from __future__ import annotations

import asyncio
import time

import psutil
import pytest

from gnomon.model import Model
from helpers.server import serving
from helpers.soak import soak


def settle(model: Model) -> None:
    deadline = time.monotonic() + 30
    while (model.stats().running or model.stats().waiting) and time.monotonic() < deadline:
        time.sleep(0.05)


def check(model: Model, *, clients: int, seconds: float) -> None:
    process = psutil.Process()
    with serving({"tiny": model}) as url:
        asyncio.run(soak(url, "tiny", clients=clients, seconds=seconds / 4))  # warm up: caches fill, threads start
        settle(model)
        before = process.memory_info().rss
        result = asyncio.run(soak(url, "tiny", clients=clients, seconds=seconds))
        settle(model)
        after = process.memory_info().rss
    assert not result.failed
    assert result.finished > clients / 4 and result.left_early > clients / 4
    stats = model.stats()
    assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)
    assert after - before < 64 << 20, f"memory grew by {(after - before) >> 20} MB"


def test_clients_that_leave_cost_nothing_afterwards(tiny: Model) -> None:
    check(tiny, clients=20, seconds=4)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_hundred_clients_for_two_minutes(tiny: Model) -> None:
    check(tiny, clients=200, seconds=120)
