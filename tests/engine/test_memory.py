"""Memory goes back to the system when the engine falls idle, and not more often than that."""

from __future__ import annotations

import pytest

from gnomon.engine import memory


def test_it_is_given_back_once_when_work_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    now = [100.0]
    monkeypatch.setattr(memory, "give_back", lambda: calls.append(1))
    monkeypatch.setattr(memory.time, "monotonic", lambda: now[0])
    housekeeper = memory.Housekeeper()
    for seconds, worked in ((5.0, True), (1.0, False), (6.0, True), (1.0, True), (1.0, False), (60.0, False)):
        now[0] += seconds
        housekeeper.after(worked)
    assert calls == [1]  # the first end came too soon, the second in time, and doing nothing is no end


def test_giving_back_works_wherever_it_runs() -> None:
    memory.give_back()
