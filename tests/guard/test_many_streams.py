"""A hundred guarded streams at once, with scanners that crash, hang and block and clients that leave.

Nothing leaks, hangs or mixes, and every page comes back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from gnomon.guard import Guard, Judgement, lookout, scanner
from gnomon.guard import scanning as registry
from gnomon.model import Model
from helpers.saying import saying

STREAMS = 100


def key_of(number: int) -> str:
    return f"ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl90{number:04d}"


@pytest.fixture
def gates() -> Iterator[dict[str, threading.Event]]:
    """Scanners of the words that each kind of stream says; the hanging one hangs until the test is over."""
    registry._load()
    Guard._of_json.cache_clear()  # it would know the scanners of the test before
    before, release, looked = dict(registry._known), threading.Event(), threading.Event()

    @scanner("t_mood", about="Does what the text says.")
    def mood(text: str, *, prompt: str = "") -> Judgement:
        if "crash" in text:
            raise RuntimeError(f"with the text in it: {text}")
        return Judgement(float("block" in text))

    @scanner("t_hang", about="Hangs.")
    def hang(text: str, *, prompt: str = "") -> Judgement:
        looked.set()
        if "hang" in text:
            release.wait(60)
        return Judgement(0.0)

    yield {"release": release, "looked": looked}
    release.set()
    registry._known.clear()
    registry._known.update(before)


def text_of(number: int, kind: str) -> str:
    return f"Stream {number} begins. The key is {key_of(number)}. Now {kind} it. And {number} ends."


KINDS = ("pass", "crash", "hang", "block", "leave")
SHOWN = {
    "pass": "Stream {n} begins. The key is [REDACTED:github-token]. Now pass it. And {n} ends.",
    "crash": "Stream {n} begins. The key is [REDACTED:github-token].",
    "hang": "Stream {n} begins. The key is [REDACTED:github-token].",
    "block": "Stream {n} begins. The key is [REDACTED:github-token].",
}
ENDS = {"pass": "stop", "crash": "content_filter", "hang": "content_filter", "block": "content_filter"}
GUARD: list[Any] = [
    {"use": "secrets", "only": ["github-token"]},
    {"use": "t_mood", "action": "block", "timeout_ms": 60_000},
]
HANG: list[Any] = [{"use": "t_hang", "action": "block", "timeout_ms": 500}]


def test_a_hundred_streams_never_leak_hang_or_mix(tiny: Model, gates: dict[str, threading.Event]) -> None:
    with saying(tiny) as model:
        handles: list[tuple[int, str, Any]] = []
        for number in range(STREAMS):
            kind = KINDS[number % len(KINDS)]
            guard = {"output": GUARD + (HANG if kind == "hang" else [])}
            said = {"say": {"text": text_of(number, kind)}, "guard": guard, "max_tokens": 200}
            handles.append((number, kind, model.submit("abc", said)))
        results: dict[int, Any] = {}
        told: dict[int, str] = {}

        def read(number: int, kind: str, handle: Any) -> None:
            if kind == "leave":
                for count, chunk in enumerate(handle):
                    told[number] = told.get(number, "") + chunk.text
                    if count == number % 3:
                        handle.cancel()
                return
            [results[number]] = handle.collect()

        threads = [threading.Thread(target=read, args=one) for one in handles]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert not any(thread.is_alive() for thread in threads)
        for number, kind, _ in handles:
            if kind == "leave":
                assert SHOWN["pass"].format(n=number).replace("pass", "leave").startswith(told.get(number, ""))
                continue
            result = results[number]
            shown = SHOWN[kind].format(n=number)
            if kind == "hang":  # whether its first look came before its time was up is the clock's affair
                shown = shown[: len(result.text)]
            assert (result.text, result.finish_reason) == (shown, ENDS[kind]), kind
            assert (str(number) in result.text or not result.text) and key_of(number)[:12] not in str(result)
            errors = [f["rule"] for f in result.findings if f["rule"] == "guard_error"]
            assert bool(errors) == (kind in ("crash", "hang"))
            assert "with the text in it" not in str(result.findings)
        end = time.monotonic() + 30  # a client that left last is cancelled before the next step
        while (stats := model.worker.stats()).running + stats.waiting and time.monotonic() < end:
            time.sleep(0.01)
        assert (stats.running, stats.waiting, stats.pages_used) == (0, 0, 0)


def test_the_engine_goes_on_while_a_scanner_thinks(tiny: Model, gates: dict[str, threading.Event]) -> None:
    """A stream whose scanner hangs holds its own text; another one is decoded to its end meanwhile."""
    guard = {"output": [{"use": "t_hang", "action": "block", "timeout_ms": 60_000}]}
    with saying(tiny) as model:
        held = model.submit("abc", {"say": {"text": "It may hang. Then more."}, "guard": guard, "max_tokens": 100})
        assert gates["looked"].wait(60)
        other = model.generate("abc", say={"text": "Something else."}, max_tokens=100)
        assert other.text == "Something else."  # type: ignore[union-attr]
        gates["release"].set()
        [result] = held.collect()
        assert result.text == "It may hang. Then more." and result.finish_reason == "stop"


SENTENCES = "".join(f"Sentence {number} may hang. " for number in range(12))


def held_back(tiny: Model, **check: Any) -> Any:
    """A stream that has run as far ahead of its scanner as it may."""
    policy = {"output": [{"use": "t_hang", "action": "block", "timeout_ms": 60_000, **check}]}
    handle = tiny.submit("abc", {"say": {"text": SENTENCES}, "guard": policy, "max_tokens": 400})
    assert tiny.worker is not None
    end = time.monotonic() + 60
    while not tiny.worker._engine.paused and time.monotonic() < end:
        time.sleep(0.01)
    assert tiny.worker._engine.paused
    return handle


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lookout, "MOST_PENDING", 4)


def test_a_stream_that_ran_ahead_of_its_scanner_pauses_alone(
    tiny: Model, gates: dict[str, threading.Event], few: None
) -> None:
    """Nothing is computed for it until the scanner has caught up; another stream is decoded to its end meanwhile."""
    with saying(tiny) as model:
        handle = held_back(model)
        steps = model.stats().steps
        time.sleep(0.1)
        assert model.stats().steps == steps
        other = model.generate("abc", say={"text": "Something else, to its end."}, max_tokens=100)
        assert other.text == "Something else, to its end."  # type: ignore[union-attr]
        assert model.stats().running == 1 and handle._queue.empty()
        gates["release"].set()
        [result] = handle.collect()
        assert result.text == SENTENCES and result.finish_reason == "stop" and not result.findings
        plain = model.generate("abc", say={"text": SENTENCES}, max_tokens=400)
        assert result.token_ids == plain.token_ids  # type: ignore[union-attr]


def test_a_paused_stream_that_is_cancelled_gives_its_pages_back(
    tiny: Model, gates: dict[str, threading.Event], few: None
) -> None:
    with saying(tiny) as model:
        handle = held_back(model)
        assert model.stats().pages_used > 0
        handle.cancel()
        [result] = handle.collect()
        assert (result.text, result.finish_reason) == ("", "cancelled")
        assert (model.stats().running, model.stats().pages_used) == (0, 0)


@pytest.mark.parametrize(("fail", "text", "reason"), [("closed", "", "content_filter"), ("open", SENTENCES, "stop")])
def test_a_paused_stream_goes_on_when_its_scanners_time_is_up(
    tiny: Model, gates: dict[str, threading.Event], few: None, fail: str, text: str, reason: str
) -> None:
    with saying(tiny) as model:
        handle = held_back(model, timeout_ms=300, fail=fail)
        [result] = handle.collect()
        assert (result.text, result.finish_reason) == (text, reason)
        assert {finding["rule"] for finding in result.findings} == {"guard_error"}
        assert (model.stats().running, model.stats().pages_used) == (0, 0)
