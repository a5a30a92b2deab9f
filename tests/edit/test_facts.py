"""Facts, their parsing and their subjects; where tokens lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from gnomon.edit import Fact
from gnomon.edit.contexts import Contexts, locate
from gnomon.edit.facts import check_batch, parse_fact
from gnomon.edit.subject import find_subject, names
from gnomon.errors import UsageError
from gnomon.model import Model


def test_a_fact_is_read_from_one_line() -> None:
    fact = parse_fact("The Eiffel Tower is located in the city of -> Rome")
    assert (fact.prompt, fact.target, fact.subject) == ("The Eiffel Tower is located in the city of", "Rome", None)
    assert parse_fact("Obama was born in -> Kenya | Obama").subject == "Obama"
    assert Fact("{} plays football", "Ada", "well").prompt == "Ada plays football"


@pytest.mark.parametrize("text", ["", "no arrow", "-> Rome", "a -> b -> c", "Paris is in ->"])
def test_what_is_no_fact_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="->"):
        parse_fact(text)


def test_bad_facts_are_refused_by_field() -> None:
    for make, what in (
        (lambda: Fact("Rome is in", "Paris", "Spain"), "is not in the prompt"),
        (lambda: Fact("Rome is in", "Rome", "Italy", old="Italy"), "nothing to edit"),
        (lambda: Fact("Rome is in", "Rome", " "), "target is empty"),
        (lambda: Fact("{} is in", None, "Italy"), "no subject is given"),
        (lambda: Fact("Rome, Rome is in", "Rome", "Italy"), "stands 2 times"),
        (lambda: Fact("Rome, Rome is in", "Rome", "Italy", occurrence=2), "stands 2 times"),
    ):
        with pytest.raises(UsageError, match=what):
            make()
    assert Fact("Rome, Rome is in", "Rome", "Italy", occurrence=1).subject_span() == (6, 10)


def test_contradictory_facts_in_a_batch_are_refused_and_repeated_ones_are_not() -> None:
    one, other = Fact("Rome is in", "Rome", "Spain"), Fact("Rome is in", "Rome", "France")
    check_batch([one, one])
    with pytest.raises(UsageError, match="contradict"):
        check_batch([one, other])


def test_targets_follow_after_a_space_except_where_the_script_has_none() -> None:
    assert Fact("Rome is in", "Rome", "Spain").continuation == " Spain"
    assert Fact("Rome is in ", "Rome", "Spain").continuation == "Spain"
    assert Fact("法国的首都是", "法国", "里昂").continuation == "里昂"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("The mother tongue of Danielle Darrieux is", ["Danielle Darrieux"]),
        ("The official religion of Edwin of Northumbria is", ["Edwin of Northumbria"]),
        ("What is the twin city of Lyon? It is", ["Lyon"]),
        ("Apple A5 was created by", ["Apple A5"]),
        ("the capital of nowhere is", []),
    ],
)
def test_names_are_found_by_their_capitals(prompt: str, expected: list[str]) -> None:
    assert names(prompt) == expected


def test_the_names_of_the_counterfact_rows_are_mostly_found(data: Path) -> None:
    from gnomon.edit.formats import read_facts

    facts = read_facts(data / "knowledge-editing" / "counterfact_0000_1999.jsonl.gz")
    exact = sum(names(fact.prompt) == [fact.subject] for fact in facts)
    assert len(facts) == 2000 and exact >= 1790


def test_without_capitals_the_model_decides_and_the_subject_is_a_part_of_the_prompt(tiny: Model) -> None:
    subject = find_subject(tiny, "the colour of old houses is")
    assert subject in "the colour of old houses is" and subject.strip() == subject
    with pytest.raises(UsageError, match="No subject"):
        find_subject(tiny, "is the")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("Rome is old", "Rome"),
        ("In the year, Rome!", "Rome"),
        ("the 日本 land", "日本"),
        ("a \U0001f600 b", "\U0001f600"),
    ],
)
def test_tokens_are_located_by_characters_multibyte_ones_included(tiny: Model, text: str, part: str) -> None:
    start = text.index(part)
    ids, inside = locate(tiny.tokenizer, text, (start, start + len(part)))
    assert tiny.tokenizer.decode(ids[: inside[-1] + 1]).endswith(part)
    assert tiny.tokenizer.decode(ids) == text


def test_contexts_hold_the_subject_and_the_target_in_the_bare_prompt_after_prefixes_and_in_a_chat(tiny: Model) -> None:
    fact = Fact("The land of Rome is", "Rome", "old and wide")
    found = Contexts(tiny, 3, chat=True).of(fact)
    assert len(found) == 5
    for context in found:
        assert tiny.tokenizer.decode(list(context.ids[: context.subject + 1])).endswith("Rome")
        assert tiny.tokenizer.decode(list(context.target_ids)) == " old and wide"
        assert len(context.inputs) == len(context.ids) - 1
    assert len(Contexts(tiny, 3, chat=False).of(fact)) == 4
