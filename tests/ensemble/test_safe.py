"""`when: safe` fuses exactly where the rule says so, and asks the others less often."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gnomon.ensemble import Ensemble
from gnomon.ensemble.draft import Draft
from gnomon.ensemble.safe import WINDOW, rows_at, window_end
from gnomon.errors import UsageError


@pytest.fixture(scope="module")
def safe(duo_dirs: list[Path]) -> Iterator[Ensemble]:
    with Ensemble(duo_dirs, threads=1, max_sequences=8, when="safe") as model:
        yield model


def best(model: Any, runner: Any, m: int, ids: list[int]) -> Any:
    return runner.core.voice(m, model.logits(ids)[-1])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("sure", [0.5, 0.02, 0.012])
def test_every_place_is_fused_or_not_as_the_rule_says(
    safe: Ensemble, temperature: float, sure: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule once more, without caches: drafts from each place, judged by whole texts."""
    monkeypatch.setattr("gnomon.ensemble.draft.SURE", sure)
    prompt, count = "the band", 14
    told = safe.generate(
        prompt, max_tokens=count, temperature=temperature, seed=5, logprobs=0, ignore_eos=True, ensemble={"trace": True}
    )
    runner: Any = safe.worker._engine.runner
    symbols, (primary, judge) = runner.symbols, safe.members
    found, expected = [], []
    for place, logprob in enumerate(told.logprobs or ()):  # type: ignore[union-attr]
        found.append(logprob.trace["ensemble"]["fused"])  # type: ignore[index]
        data = symbols.text(told.token_ids[:place])  # type: ignore[union-attr]
        ids = primary.tokenizer.encode(prompt)
        voice = first = best(safe.models[0], runner, 0, ids + primary.retokenizer.ids(data))
        draft, whole = [int(voice.row().argmax())], data
        while place + len(draft) < window_end(place, 0) and draft[-1] != symbols.stop:
            whole = data + symbols.text(draft)
            voice = best(safe.models[0], runner, 0, ids + primary.retokenizer.ids(whole))
            draft.append(int(voice.row().argmax()))
        own = judge.retokenizer.ids(data + symbols.text(draft))
        ends = [sum(len(judge.retokenizer.texts[i]) for i in own[:n]) for n in range(len(own) + 1)]
        if first.best >= sure or len(data) not in ends:
            expected.append(False)
            continue
        context = judge.tokenizer.encode(prompt) + own[: ends.index(len(data))]
        other = best(safe.models[1], runner, 1, context)
        agrees = (first.best + math.exp(other.at([draft[0]])[0])) / 2 >= sure
        expected.append(not agrees and int(other.row().argmax()) != draft[0])
    assert found == expected
    if sure == 0.5:
        assert any(found)


def test_a_judge_of_one_mind_is_asked_once_a_window(tiny_dir: Path) -> None:
    asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    with Ensemble([tiny_dir, tiny_dir], threads=1, core="union", when="safe") as twins:
        used = twins.generate("the band", **asked).usage.details["ensemble"]  # type: ignore[union-attr]
    assert used["fused_steps"] == 0 and used["steps"] == 20
    assert used["forwards"]["tiny-llama#2"] <= 6 < 20 <= used["forwards"]["tiny-llama"]


def test_others_are_not_asked_where_the_primary_is_sure(safe: Ensemble, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gnomon.ensemble.draft.SURE", 0.0)
    asked = {"max_tokens": 20, "temperature": 0, "ignore_eos": True}
    alone = safe.generate("the band", **asked)
    used = alone.usage.details["ensemble"]  # type: ignore[union-attr]
    assert used["forwards"]["tiny-gemma"] == 0 and used["fused_steps"] == 0
    shut = safe.generate("the band", **asked, ensemble={"when": "gate", "threshold": 0.0})
    assert alone.token_ids == shut.token_ids  # type: ignore[union-attr]


def test_rows_stand_where_a_member_has_a_token_boundary() -> None:
    assert rows_at([0, 2, 3, 5], [b"ab", b"cde"], before=7) == (3, [0, 1, None, 2])
    assert rows_at([3], [b"ab", b"cde"], before=7) == (0, [None])
    assert rows_at([5], [b"ab", b"cde"], before=7) == (1, [0])


def test_windows_are_counted_from_the_beginning_of_the_answer() -> None:
    assert [window_end(start, 3) for start in (3, 4, 7, 8)] == [8, 8, 8, 13]
    assert WINDOW == 5


def test_a_draft_covers_a_text_only_as_long_as_it_came_true() -> None:
    draft = Draft(2, [1, 2], [3, 4], [None, None])  # type: ignore[list-item]
    assert draft.covers([1, 2]) and draft.covers([1, 2, 3])
    assert not draft.covers([1, 2, 3, 4]) and not draft.covers([1, 2, 9]) and not draft.covers([1, 9])
    assert not draft.covers([9, 2])


def test_safe_needs_no_threshold_and_takes_no_fusion_of_all_members(duo_dirs: list[Path]) -> None:
    with pytest.raises(UsageError, match="threshold needs"):
        Ensemble(duo_dirs, when="safe", threshold=0.5)
    with pytest.raises(UsageError, match="leaves some out"):
        Ensemble(duo_dirs, when="safe", fuse="contrastive")
