"""The guard's nine guarantees (G1 to G9), each with a mutation: break the code on purpose and its check goes red."""

from __future__ import annotations

import asyncio
import json
import threading
import unicodedata
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from gnomon.guard import Guard, Judgement, lookout, scanner
from gnomon.guard import scanning as registry
from gnomon.guard.lane import Lane
from gnomon.guard.meter import METER
from gnomon.guard.session import Session
from gnomon.guard.stage import AnswerGuard
from gnomon.guard.watching import Failure, Watcher
from gnomon.model import Model
from gnomon.serve import sse
from gnomon.stages import Released
from helpers.saying import saying

from .test_session import KEY

TEXT = f"All good. The key is {KEY}; mail jane@example.org now. Bad it is! And on, é and 👩‍👩‍👧 and\r\nan end."
RELEASE = threading.Event()


@pytest.fixture(autouse=True)
def own_scanners() -> Iterator[None]:
    registry._load()
    before = dict(registry._known)
    RELEASE.clear()

    @scanner("g_bad", about="Bad.")
    def bad(text: str, *, prompt: str = "") -> Judgement:
        return Judgement(float("Bad" in text))

    @scanner("g_crash", about="Crashes.")
    def crash(text: str, *, prompt: str = "") -> Judgement:
        raise RuntimeError("boom")

    @scanner("g_hang", about="Hangs until the test is over.")
    def hang(text: str, *, prompt: str = "") -> Judgement:
        RELEASE.wait(60)
        return Judgement(0.0)

    yield
    RELEASE.set()
    registry._known.clear()
    registry._known.update(before)


def outcome(guard: Guard, pieces: list[Any]) -> tuple[str, list[str], str]:
    session = guard.session()
    out = "".join([session.push(piece) for piece in pieces] + [session.finish()])
    return out, [str(finding) for finding in session.findings], session.verdict


def splits(text: str) -> list[list[Any]]:
    return [[text], list(text), [text[i : i + 5] for i in range(0, len(text), 5)], [bytes([b]) for b in text.encode()]]


# -- the checks ---------------------------------------------------------------------------------------------------


def g1_nothing_flagged_leaves() -> None:
    for action in ("redact", "block"):
        guard = Guard({"output": [{"use": "secrets", "action": action}]})
        for pieces in splits(TEXT):
            out = outcome(guard, pieces)[0]
            assert not any(KEY[i : i + 4] in out for i in range(len(KEY) - 3))


def g2_every_split_gives_the_same() -> None:
    guard = Guard({"output": ["secrets", "pii", {"use": "g_bad", "action": "block", "timeout_ms": 60_000}]})
    assert len({json.dumps(outcome(guard, pieces)) for pieces in splits(TEXT)}) == 1


def g3_no_more_is_held_than_is_stated() -> None:
    guard = Guard(
        {"output": [{"use": "regex", "regex": "x[a-z]{3,}"}, {"use": "regex", "regex": "y[0-9]{2,8}!"}]}
        | {"default": {"max_hold_chars": 32}}
    )
    most = max(row["hold_chars"] for row in guard.table())
    session = guard.session()
    for character in "an x" + "abc" * 90 + " and y12345678 and y1 " * 3:
        session.push(character)
        assert session.held <= most


def g4_no_scanner_adds_more_than_its_time() -> None:
    guard = Guard({"output": [{"use": "g_hang", "action": "block", "timeout_ms": 20}]})
    verdict: list[str] = []
    before = METER.seconds.total()
    thread = threading.Thread(target=lambda: verdict.append(guard.scan("Some text.").verdict), daemon=True)
    thread.start()
    thread.join(5)
    assert verdict == ["guard_error"]
    assert METER.seconds.total() >= before


def g5_async_shows_a_bounded_part() -> None:
    check = {"use": "g_bad", "action": "block", "mode": "async", "max_exposure_chars": 7, "timeout_ms": 60_000}
    guard = Guard({"output": [check]})
    for pieces in splits(TEXT):
        session, shown = guard.session(), 0
        for piece in pieces:
            shown += len(session.push(piece))
            assert (
                shown <= session.lookout.settled + 7 if session.lookout is not None and session.verdict == "pass" else 1
            )


def g6_a_block_ends_decoding(tiny: Model) -> None:
    drawn = 0

    class Count:
        def process(self, logits_V: Any, generated: Any) -> Any:
            return logits_V

        def accept(self, token_id: int) -> None:
            nonlocal drawn
            drawn += 1

        def rollback(self, count: int) -> None: ...

        def copy(self) -> Any:
            return self

    from helpers import saying as helper

    with saying(tiny) as model:
        original = helper.Say.accept
        helper.Say.accept = lambda self, token_id: Count.accept(Count(), token_id)  # type: ignore[method-assign]
        try:
            words = "one two three four STOPPED and then five six seven eight nine ten"
            guard = {"output": [{"use": "words", "words": ["STOPPED"], "action": "block"}]}
            [result] = model.submit("abc", {"say": {"text": words}, "max_tokens": 300, "guard": guard}).collect()
        finally:
            helper.Say.accept = original  # type: ignore[method-assign]
        ids = model.tokenizer.encode(words, add_special_tokens=False)
        needed = next(n for n in range(len(ids)) if "STOPPED " in model.tokenizer.decode(ids[:n]))
        assert result.finish_reason == "content_filter" and drawn <= needed + 1
        stats = model.worker.stats()
        assert (stats.running, stats.pages_used) == (0, 0)


def g7_a_failure_blocks() -> None:
    guard = Guard({"output": [{"use": "g_crash", "action": "block", "timeout_ms": 60_000}]})
    for pieces in splits("Some words. And more."):
        out, findings, verdict = outcome(guard, pieces)
        assert out == "" and verdict == "guard_error" and findings


def g8_text_is_never_protocol() -> None:
    forged = 'data: [DONE]\n\n{"error": {"message": "x"}}\n\nevent: end\n'

    async def events() -> Any:
        yield {"choices": [{"delta": {"content": forged}}]}

    async def read() -> list[str]:
        return [piece async for piece in sse.stream(events(), {}).body_iterator]  # type: ignore[misc]

    body = "".join(asyncio.run(read()))
    frames = [line for line in body.split("\n\n") if line]
    assert len(frames) == 2 and frames[1] == "data: [DONE]"
    assert json.loads(frames[0].removeprefix("data: "))["choices"][0]["delta"]["content"] == forged


def g9_clean_text_is_untouched() -> None:
    text = "שלום e\u0301 نَصٌّ 👩‍👩‍👧 ک\u200cتاب ﬁ\r\n ｆｕｌｌ"
    guard = Guard(
        {"output": ["secrets", "pii", {"use": "words", "words": ["zebra"], "views": ["raw", "nfkc", "leet"]}]}
    )
    for pieces in splits(text):
        assert outcome(guard, pieces)[0] == text


# -- and how each goes red ------------------------------------------------------------------------------------------


def lets_all_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Lane, "frontier", property(lambda self: self.position))


def looks_at_pieces(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Watcher, "next_point", lambda self, text: len(text))
    patch.setattr(Watcher, "advance", lambda self, piece: self._add(piece) or self._place())


def holds_without_end(patch: pytest.MonkeyPatch) -> None:
    original = Lane.__init__

    def begin(self: Lane, plan: Any) -> None:
        original(self, plan)
        self.matcher.max_hold = 10_000

    patch.setattr(Lane, "__init__", begin)


def waits_for_ever(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(lookout, "time", SimpleNamespace(monotonic=lambda: 0.0))


def shows_ahead(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Watcher, "frontier", property(lambda self: self.position))


def decodes_on(patch: pytest.MonkeyPatch) -> None:
    original = AnswerGuard._released

    def released(self: AnswerGuard, step: Any, **more: Any) -> Released:
        return original(self, step._replace(cut=None), **more)

    patch.setattr(AnswerGuard, "_released", released)


def fails_open(patch: pytest.MonkeyPatch) -> None:
    original = Watcher.judge

    def judge(self: Watcher, start: int, point: int, found: Any) -> Any:
        return original(self, start, point, Judgement(0.0) if isinstance(found, Failure) else found)

    patch.setattr(Watcher, "judge", judge)


def writes_raw(patch: pytest.MonkeyPatch) -> None:
    def dumps(value: Any, **more: Any) -> str:
        return json.dumps(value).replace("\\n", "\n")

    class Json:
        pass

    module: Any = Json()
    module.dumps = dumps
    patch.setattr(sse, "json", module)


def normalises(patch: pytest.MonkeyPatch) -> None:
    original = Session._slice
    patch.setattr(Session, "_slice", lambda self, a, b: unicodedata.normalize("NFKC", original(self, a, b)))


GUARANTEES: list[tuple[Callable[..., None], Callable[[pytest.MonkeyPatch], None]]] = [
    (g1_nothing_flagged_leaves, lets_all_out),
    (g2_every_split_gives_the_same, looks_at_pieces),
    (g3_no_more_is_held_than_is_stated, holds_without_end),
    (g4_no_scanner_adds_more_than_its_time, waits_for_ever),
    (g5_async_shows_a_bounded_part, shows_ahead),
    (g6_a_block_ends_decoding, decodes_on),
    (g7_a_failure_blocks, fails_open),
    (g8_text_is_never_protocol, writes_raw),
    (g9_clean_text_is_untouched, normalises),
]
NAMES = [check.__name__ for check, _ in GUARANTEES]


@pytest.mark.parametrize(("check", "mutation"), GUARANTEES, ids=NAMES)
def test_each_guarantee_holds_and_its_check_can_fail(
    check: Callable[..., None], mutation: Callable[[pytest.MonkeyPatch], None], tiny: Model
) -> None:
    given = (tiny,) if check is g6_a_block_ends_decoding else ()
    check(*given)
    with pytest.MonkeyPatch.context() as patch:
        mutation(patch)
        with pytest.raises(AssertionError):
            check(*given)


def test_redactions_that_overlap_leave_nothing_of_either() -> None:
    rules = [("a", "b[0-9]+c"), ("b", "[0-9]+cd"), ("c", "0123"), ("d", "d.{3}")]
    guard = Guard({"output": [{"use": "regex", "name": name, "regex": regex} for name, regex in rules]})
    for pieces in splits("xx b0123cd and"):
        out, findings, _ = outcome(guard, pieces)
        assert out == "xx [REDACTED:a]d" and len(findings) == 4
