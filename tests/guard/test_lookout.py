"""Scanners beside the text: what leaves and what is found never depends on when their verdicts come."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.guard import Guard, Judgement, lookout, scanner
from gnomon.guard import scanning as registry
from gnomon.guard.session import Session
from gnomon.guard.workers import MOST, Workers
from gnomon.model import Model
from helpers.late import late_scanner
from helpers.saying import saying
from helpers.server import serving

LETTERS = st.text(alphabet="aab. ", max_size=60)


@pytest.fixture(autouse=True)
def own_scanners() -> Iterator[None]:
    registry._load()
    before = dict(registry._known)

    @scanner("t_count", about="More a than b.")
    def count(text: str, *, prompt: str = "", letter: str = "a", share: float = 0.5) -> Judgement:
        if text.endswith("b b"):
            raise RuntimeError("boom")
        return Judgement(float(text.count(letter) > share * len(text)))

    yield
    registry._known.clear()
    registry._known.update(before)


class ByHand:
    """Workers whose calls come back when the test says so."""

    def __init__(self) -> None:
        self.calls: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        self.calls.append((Future(), function, arguments))
        return self.calls[-1][0]

    def bring(self, place: int) -> None:
        """One of those that are out comes back."""
        if self.calls:
            future, function, arguments = self.calls.pop(place % len(self.calls))
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(function(*arguments))
                except RuntimeError as error:
                    future.set_exception(error)


def outcome(session: Session, out: str) -> tuple[str, list[str], str]:
    return out, [str(finding) for finding in session.findings], session.verdict


def checks() -> st.SearchStrategy[list[dict[str, Any]]]:
    scanner_check = st.fixed_dictionaries(
        {
            "use": st.just("t_count"),
            "action": st.sampled_from(["block", "block", "flag"]),
            "stride": st.sampled_from([3, 7, 240]),
            "context": st.sampled_from([4, 1000]),
            "debounce": st.sampled_from([1, 2]),
            "timeout_ms": st.just(60_000),
            "fail": st.sampled_from(["open", "closed"]),
            "options": st.fixed_dictionaries(
                {"letter": st.sampled_from(["a", "b"]), "share": st.sampled_from([0.3, 0.6])}
            ),
        }
    )
    rule = st.fixed_dictionaries(
        {
            "use": st.just("regex"),
            "regex": st.sampled_from(["aa+", "ab", "a[ab. ]{2,9}b", "b\\."]),
            "action": st.sampled_from(["redact", "flag", "block"]),
        }
    )
    return st.tuples(
        st.lists(scanner_check, min_size=1, max_size=3), st.lists(rule, max_size=2)
    ).map(lambda pair: [*pair[0], *pair[1]])  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(checks(), LETTERS, st.lists(st.integers(0, 9), max_size=80), st.integers(1, 9))
def test_verdicts_that_come_late_and_in_any_order_change_nothing(
    rules: list[dict[str, Any]], text: str, order: list[int], size: int
) -> None:
    guard = Guard({"output": [{**rule, "name": f"r{i}"} for i, rule in enumerate(rules)]})
    at_once = guard.session()
    expected = outcome(at_once, at_once.push(text) + at_once.finish())
    hands = ByHand()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "workers_of", lambda name: hands)
        late = guard.session(waits=False)
        out, places = "", iter(order)
        for at in range(0, len(text), size):
            out += late.push(text[at : at + size])
            assert expected[0].startswith(out) or late.verdict in ("block", "guard_error")
            for place in places:
                if place > 6:
                    break
                hands.bring(place)
        for place in [*places, *range(1000)]:
            if late.lookout is None or not hands.calls:
                break
            hands.bring(place)
        patch.undo()
        out += late.finish()
    assert outcome(late, out) == expected


@settings(max_examples=100, deadline=None)
@given(checks(), LETTERS, st.integers(0, 60))
def test_a_session_with_looks_out_can_be_saved(rules: list[dict[str, Any]], text: str, cut: int) -> None:
    guard = Guard({"output": [{**rule, "name": f"r{i}"} for i, rule in enumerate(rules)]})
    at_once = guard.session()
    expected = outcome(at_once, at_once.push(text) + at_once.finish())
    first = guard.session(waits=False)
    out = first.push(text[:cut])
    second = guard.resume(json.loads(json.dumps(first.state())))
    out += second.push(text[cut:]) + second.finish()
    assert outcome(second, out) == expected


def test_a_push_never_waits_for_a_scanner() -> None:
    hands = ByHand()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lookout, "workers_of", lambda name: hands)
        session = Guard({"output": [{"use": "t_count", "action": "block"}]}).session(waits=False)
        assert session.push("Plain words here. And more of them. ") == "" and len(hands.calls) == 2
        hands.bring(1)
        assert session.push("") == ""  # the first sentence is still out
        hands.bring(0)
        assert session.push("") == "Plain words here. And more of them."


def test_calls_that_hang_leave_room_for_others() -> None:
    workers, hold, done, begun = Workers("test"), threading.Event(), threading.Event(), threading.Semaphore(0)

    def hang() -> bool:
        begun.release()
        return hold.wait()

    hanging = [workers.submit(hang) for _ in range(MOST - 1)]
    for _ in hanging:
        assert begun.acquire(timeout=10)
    waiting = workers.submit(done.set)
    assert done.wait(10) and waiting.result(10) is None and workers.threads <= MOST
    hold.set()
    assert all(future.result(10) for future in hanging)
    assert workers.submit(lambda: 7).result(10) == 7


def test_what_async_let_out_too_early_is_retracted_exactly(tiny: Model) -> None:
    """The offsets are those of the text that the reader has, redactions before it included."""
    checks: list[dict[str, Any]] = [
        {"use": "regex", "name": "key", "regex": "K[0-9]{4}", "replacement": "#"},
        {"use": "t_late", "action": "block", "mode": "async", "max_exposure_chars": 60, "timeout_ms": 60_000},
    ]
    text = "The key is K1234, kept. Some ugly thing now. " + "And on it goes. " * 10
    with late_scanner("ugly") as late, saying(tiny) as model:
        shown, retracted = "", []
        for chunk in model.stream("abc", say={"text": text}, max_tokens=400, guard={"output": checks}):
            shown += chunk.text
            retracted += [finding["retract"] for finding in chunk.findings if "retract" in finding]
            if late.looked.is_set() and len(shown) > 50:
                late.go.set()
    [(start, end)] = retracted
    assert shown[:start] == "The key is #, kept." and end == len(shown) and len(shown) - start <= 60


@pytest.mark.parametrize(
    ("text", "stands"),
    [
        ("The key K1234 is out, and on it goes. " + "And on. " * 8, "The key "),  # it begins inside the first mark
        ("AK1234K5678 is out, and on it goes. " + "And on. " * 8, "A#"),  # inside the second of two
        ("At K12345678 is out, and on it goes. " + "And on. " * 8, "At "),  # inside one that two rules made
    ],
)
def test_what_begins_inside_a_redaction_is_taken_back_with_its_mark(tiny: Model, text: str, stands: str) -> None:
    checks: list[dict[str, Any]] = [
        {"use": "regex", "name": "key", "regex": "K[0-9]{4}", "replacement": "#"},
        {"use": "regex", "name": "number", "regex": "[0-9]{5,8}", "replacement": "~~~~~~~~"},
        {"use": "t_late", "action": "block", "mode": "async", "stride": 10, "timeout_ms": 60_000},
    ]
    with late_scanner(" is out") as late, saying(tiny) as model:
        shown, retracted = "", []
        for chunk in model.stream("abc", say={"text": text}, max_tokens=400, guard={"output": checks}):
            shown += chunk.text
            retracted += [finding["retract"] for finding in chunk.findings if "retract" in finding]
            if late.looked.is_set() and "goes" in shown:
                late.go.set()
    assert [(shown[:start], end) for start, end in retracted] == [(stands, len(shown))]


def test_a_retraction_reaches_the_official_client(tiny: Model) -> None:
    checks = [{"use": "t_count", "action": "block", "mode": "async", "max_exposure_chars": 400, "timeout_ms": 60_000}]
    said = {"text": "All is well here. aaaaaaaa aaaaaaaaa aaaaaa aaaaa. And more of it"}
    with saying(tiny) as model, serving({"tiny": model}) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
        extra = {"say": said, "guard": {"output": checks}}
        events = list(
            client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "a"}], stream=True, max_tokens=200, extra_body=extra
            )
        )
        text = "".join(event.choices[0].delta.content or "" for event in events)
        found = [
            f for event in events for f in (getattr(event.choices[0], "guard", None) or {"findings": []})["findings"]
        ]
        ends = [event.choices[0].finish_reason for event in events if event.choices[0].finish_reason]
        assert ends == ["content_filter"] and len(found) == 1
        if "retract" in found[0]:  # whether anything had left by then is the clock's affair
            assert text[: found[0]["retract"][0]] == "All is well here."
        else:
            assert text == "All is well here."
