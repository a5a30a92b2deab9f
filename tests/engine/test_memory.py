"""Memory goes back to the system when the engine falls idle, and not more often than that."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import pytest

import gnomon
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


def test_a_dropped_model_ends_its_engine_and_frees_its_weights(tiny_dir: Path) -> None:
    model = gnomon.load(str(tiny_dir))
    assert model.generate("Hi", max_tokens=2).text
    network, worker = weakref.ref(model.network), model.worker
    del model
    gc.collect()
    worker._thread.join(10)
    assert not worker._thread.is_alive()
    del worker
    gc.collect()
    assert network() is None


def test_a_stream_keeps_its_model(tiny_dir: Path) -> None:
    chunks = gnomon.load(str(tiny_dir)).stream("Hi", max_tokens=40, ignore_eos=True)
    gc.collect()
    first = next(chunks)
    gc.collect()
    assert len([first, *chunks]) > 10
