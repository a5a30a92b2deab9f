"""Rollback: what would be blocked is drawn again, otherwise; nothing of it is ever shown, and giving up is a block."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from gnomon.guard import Judgement, scanner
from gnomon.guard import scanning as registry
from gnomon.guard.detour import Detour
from gnomon.guard.meter import METER
from gnomon.model import Model


def policy(pattern: str, action: str = "block", **rollback: Any) -> dict[str, Any]:
    return {
        "output": [{"use": "regex", "name": "no", "regex": pattern, "action": action}],
        "on_block": {"rollback": {"tokens": 40, "retries": 100, "on": ["block", "redact"]} | rollback},
    }


def drawn(model: Model, **options: Any) -> Any:
    return model.generate("abc", max_tokens=40, ignore_eos=True, **options)


def pieces(model: Model) -> list[str]:
    """What the model says by itself, by token."""
    return [model.tokenizer.token_text(token) for token in drawn(model).token_ids]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 5}, {"temperature": 1.0, "seed": 6, "n": 2}])
@pytest.mark.parametrize("action", ["block", "redact"])
def test_an_answer_goes_on_around_what_is_blocked(tiny: Model, sampling: dict[str, Any], action: str) -> None:
    before, results = METER.rollbacks, drawn(tiny, guard=policy("[aeiou]", action), **sampling)
    for result in results if isinstance(results, list) else [results]:
        assert not re.search("[aeiou]", result.text) and result.finish_reason == "length"
        assert tiny.tokenizer.decode(result.token_ids) == result.text and len(result.token_ids) == 40
        assert all(finding["action"] == "rollback" for finding in result.findings)
    assert METER.rollbacks > before and tiny.worker.stats().running == 0


def test_what_stays_is_what_would_have_been_said(tiny: Model) -> None:
    """Greedy: up to the branch the answer is the model's own; there the next best token stands."""
    said = pieces(tiny)
    whole = [text.isascii() and text.isprintable() for text in said]  # some tokens are halves of characters
    place = next(i for i in range(3, 40) if whole[i - 1] and whole[i] and said[i] not in "".join(said[:i]))
    word = re.escape(said[place])
    result = drawn(tiny, guard=policy(word))
    text = drawn(tiny).text
    assert result.text.startswith(text[: text.index(said[place])]) and not re.search(word, result.text)
    assert result.token_ids[:place] == drawn(tiny).token_ids[:place] and result.finish_reason == "length"


def test_streaming_shows_only_what_stays(tiny: Model) -> None:
    options = {"guard": policy("[aeiou]"), "max_tokens": 40, "ignore_eos": True, "temperature": 1.0, "seed": 3}
    whole = tiny.generate("abc", **options)
    chunks = list(tiny.stream("abc", **options))
    assert "".join(chunk.text for chunk in chunks) == whole.text  # type: ignore[union-attr]
    assert [token for chunk in chunks for token in chunk.token_ids] == whole.token_ids  # type: ignore[union-attr]


def test_giving_up_is_a_block(tiny: Model) -> None:
    result = drawn(tiny, guard=policy(r"(?s).{6}", retries=3))
    assert result.finish_reason == "content_filter" and len(result.text) < 6
    assert [finding["action"] for finding in result.findings] == ["rollback"] * 3 + ["block"]


def test_at_most_so_many_tokens_are_taken_back(tiny: Model) -> None:
    """A match that began further back than that blocks."""
    result = drawn(tiny, guard=policy(r"(?s)^.{30}", tokens=2, retries=50))
    assert result.finish_reason == "content_filter" and result.text == ""


def test_stop_strings_hold_across_a_branch(tiny: Model) -> None:
    text = drawn(tiny, guard=policy("[aeiou]"), temperature=1.0, seed=8).text
    stop = text[20:23]
    result = drawn(tiny, guard=policy("[aeiou]"), temperature=1.0, seed=8, stop=[stop])
    assert result.text == text[: text.index(stop)] and result.finish_reason == "stop"


def test_redactions_before_the_branch_stay(tiny: Model) -> None:
    guard = policy("[aeiou]")
    guard["output"].insert(0, {"use": "regex", "name": "t", "regex": "[tTsS]", "replacement": "#"})
    guard["on_block"]["rollback"]["on"] = ["block"]
    result = drawn(tiny, guard=guard, temperature=1.0, seed=4)
    assert not re.search("[aeioutTsS]", result.text) and result.finish_reason == "length" and "#" in result.text
    assert {finding["action"] for finding in result.findings} == {"rollback", "redact"}


@pytest.mark.parametrize("seed", range(12))
def test_matches_over_several_tokens_stops_and_redactions_together(tiny: Model, seed: int) -> None:
    guard = policy("[a-m][^a-m]")
    guard["output"].append({"use": "regex", "name": "digits", "regex": "[0-9]{1,3}", "replacement": "#"})
    guard["on_block"]["rollback"] |= {"on": ["block", "redact"] if seed % 2 else ["block"], "retries": 60}
    options: dict[str, Any] = {"guard": guard, "temperature": 1.0, "seed": seed, "stop": ["xy", "q"]}
    result, chunks = drawn(tiny, **options), list(tiny.stream("abc", max_tokens=40, ignore_eos=True, **options))
    assert "".join(chunk.text for chunk in chunks) == result.text
    assert [token for chunk in chunks for token in chunk.token_ids] == result.token_ids
    assert not re.search("[a-m][^a-m]|[0-9]|xy|q", result.text)
    spelt = tiny.tokenizer.decode(result.token_ids)
    if "#" not in result.text and result.finish_reason == "length":
        assert spelt == result.text
    assert not re.search("[0-9]", spelt)


@pytest.fixture
def vowels() -> Iterator[None]:
    registry._load()
    before = dict(registry._known)

    @scanner("t_vowels", about="An a among what was said last.")
    def judge(text: str, *, prompt: str = "") -> Judgement:
        return Judgement(float("a" in text))

    yield
    registry._known.clear()
    registry._known.update(before)


def test_a_late_verdict_takes_back_the_same(tiny: Model, vowels: None) -> None:
    """However far decoding had gone on when it came, the answer is the same."""
    guard = {
        "output": [{"use": "t_vowels", "action": "block", "stride": 4, "context": 4, "timeout_ms": 60_000}],
        "on_block": {"rollback": {"tokens": 40, "retries": 100}},
    }
    results = [drawn(tiny, guard=guard, temperature=1.0, seed=9) for _ in range(4)]
    decided = {result.text[:20] for result in results}
    assert len(decided) == 1 and "a" not in decided.pop()


def test_a_detour_bans_only_what_was_taken_back_by_the_guard() -> None:
    import torch

    detour = Detour()
    for token in (1, 2, 3):
        detour.accept(token)
    detour.rollback(1)
    assert detour.process(torch.zeros(5), [1, 2]).tolist() == [0] * 5
    detour.accept(4)
    detour.armed = True
    detour.rollback(2)
    assert detour.process(torch.zeros(5), [1]).tolist() == [0, 0, -1e9, 0, 0]
    assert detour.copy().banned == {1: {2}}
    detour.accept(0)
    detour.accept(0)
    detour.armed = True
    detour.rollback(3)
    assert detour.banned == {0: {1}}
