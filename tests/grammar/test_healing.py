"""Token healing: the prompt's end may become part of a longer token, and nothing of it is said twice."""

from __future__ import annotations

import pytest

from gnomon.errors import Conflict
from gnomon.grammar.healing import HealOptions, trim
from gnomon.grammar.selecting import spelling_of
from gnomon.model import Model
from gnomon.stages import StageContext

PROMPT = 'The link is <a href="http:'


def trimmed(model: Model, ids: list[int]) -> tuple[list[int], bytes]:
    context = StageContext(model.tokenizer, "m", 0, lambda _: None)
    return trim(HealOptions(), ids, context), context.memory.get("healed", b"")


@pytest.mark.model
def test_a_colon_is_taken_back_because_longer_tokens_begin_with_it(smollm2: Model) -> None:
    ids = smollm2.encode(PROMPT)
    left, healed = trimmed(smollm2, ids)
    assert healed == b":" and left == ids[:-1]
    agreeing = spelling_of(smollm2.tokenizer).beyond(healed)
    assert any(smollm2.tokenizer.token_bytes(token) == b"://" for token in agreeing)


@pytest.mark.model
def test_the_healed_text_goes_on_where_the_prompt_ends(smollm2: Model) -> None:
    healed = smollm2.generate(PROMPT, heal=True, max_tokens=8)
    assert healed.text.startswith("//")
    assert smollm2.tokenizer.token_bytes(healed.token_ids[0]) == b"://"
    assert healed.text == smollm2.tokenizer.decode(healed.token_ids)[1:]
    streamed = "".join(chunk.text for chunk in smollm2.stream(PROMPT, heal=True, max_tokens=8))
    assert streamed == healed.text


def test_healed_text_begins_with_what_was_taken_back_at_any_temperature(tiny: Model) -> None:
    for seed in range(20):
        prompt = ["the qui", "a th", "abc "][seed % 3]
        ids, healed = trimmed(tiny, tiny.encode(prompt))
        answer = tiny.generate(prompt, heal=True, max_tokens=12, temperature=1.5, seed=seed, ignore_eos=True)
        whole = b"".join(tiny.tokenizer.token_bytes(token) for token in answer.token_ids)
        assert whole.startswith(healed)
        assert answer.text == tiny.tokenizer.decode(answer.token_ids)[len(healed.decode()) :]
        assert answer.usage.prompt_tokens == len(ids)


def test_without_anything_to_heal_the_text_is_the_same_as_without_it(tiny: Model) -> None:
    ids = tiny.encode("abc")
    end = next(iter(tiny.tokenizer.eos_token_ids))
    prompt = [*ids, end]
    assert trimmed(tiny, prompt) == (prompt, b"")
    assert tiny.generate(prompt, heal=True, max_tokens=6).token_ids == tiny.generate(prompt, max_tokens=6).token_ids


def test_a_conversation_is_never_healed(tiny: Model) -> None:
    plain, healed = tiny.chat("abc", max_tokens=6), tiny.chat("abc", heal=True, max_tokens=6)
    assert plain.token_ids == healed.token_ids  # type: ignore[union-attr]


def test_a_grammar_beside_it_is_refused_with_the_reason(tiny: Model) -> None:
    with pytest.raises(Conflict, match="begins where the prompt ends"):
        tiny.generate("a", heal=True, grammar={"regex": "a"})


def test_a_healed_run_is_noted_with_its_whole_prompt(tiny: Model) -> None:
    seen: list[list[int]] = []
    tiny.submit("the qui", {"heal": True, "max_tokens": 4}, observer=lambda run: seen.append(run.prompt_ids)).collect()
    assert seen == [tiny.encode("the qui")]
