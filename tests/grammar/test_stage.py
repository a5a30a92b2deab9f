"""Decoding under a grammar: masks, checks with rollback, an end in time, forced tokens; on tiny random models."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.errors import GrammarError
from gnomon.generation import Generation
from gnomon.grammar import compile
from gnomon.loading import load
from gnomon.model import Model

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "uniqueItems": True, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
HARD: list[Any] = [
    PERSON,
    {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "uniqueItems": True, "minItems": 4},
    {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True, "minItems": 2},
    {"type": "object", "patternProperties": {"^a": {"type": "integer"}, "b$": {"type": "integer"}}, "minProperties": 2},
    {"type": "array", "contains": {"const": "x"}, "items": {"type": "string", "maxLength": 2}},
    {"type": "integer", "oneOf": [{"multipleOf": 2}, {"multipleOf": 3}]},
    {"if": {"required": ["a"]}, "then": {"required": ["b"]}, "type": "object", "maxProperties": 2},
    {"type": "object", "propertyNames": {"maxLength": 2, "pattern": "^[a-c]*$"}, "minProperties": 1},
    {"type": "string", "not": {"pattern": "a"}, "maxLength": 5},
    {"anyOf": [{"type": "object", "required": ["k"], "properties": {"k": {"const": 1}}}, {"type": "null"}]},
]


def one(result: Generation | list[Generation]) -> Generation:
    assert isinstance(result, Generation)
    return result


@pytest.mark.parametrize("schema", HARD, ids=lambda s: json.dumps(s)[:60])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_the_model_wants_the_text_is_valid(schema: Any, seed: int, tiny: Model) -> None:
    grammar = compile(schema)
    shortest = len(grammar.shortest_tokens(tiny.tokenizer))
    for more in (0, 1, 20):
        result = one(tiny.generate("abc", grammar=grammar, temperature=1.5, seed=seed, max_tokens=shortest + more))
        assert grammar.accepts(result.text), (result.text, more)
        assert result.completed and result.parsed == json.loads(result.text)
        assert len(result.token_ids) <= shortest + more
        assert result.trace is not None and len(result.trace.kept_mass) == len(result.token_ids)


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), limit=st.integers(1, 60))
def test_the_limit_is_kept_or_refused_before_decoding(seed: int, limit: int, tiny: Model) -> None:
    grammar = compile(PERSON)
    shortest = len(grammar.shortest_tokens(tiny.tokenizer))
    if limit < shortest:
        with pytest.raises(GrammarError, match="max_tokens"):
            tiny.generate("abc", grammar=grammar, max_tokens=limit)
        return
    result = one(tiny.generate("abc", grammar=grammar, temperature=2.0, seed=seed, max_tokens=limit))
    assert grammar.accepts(result.text) and len(result.token_ids) <= limit


def test_an_end_in_time_says_length_and_completed(tiny: Model) -> None:
    grammar = compile({"type": "array", "items": {"type": "string"}, "minItems": 1})
    result = one(tiny.generate("abc", grammar=grammar, max_tokens=12, temperature=1.0, seed=1))
    assert result.completed and grammar.accepts(result.text)
    assert result.finish_reason == "length"
    assert result.trace is not None and "closed" in result.trace.kinds


def test_cut_on_request_leaves_the_text_incomplete(tiny: Model) -> None:
    options = {"schema": {"type": "string", "minLength": 40}, "on_length": "cut"}
    result = one(tiny.generate("abc", grammar=options, max_tokens=5, temperature=1.0, seed=1))
    assert (result.finish_reason, result.completed, result.parsed) == ("length", False, None)
    assert len(result.token_ids) == 5


def test_an_unsatisfiable_schema_is_refused_before_decoding(tiny: Model) -> None:
    before = tiny.stats().steps
    for options in (False, {"schema": False, "on_length": "cut"}):
        with pytest.raises(GrammarError, match="No text satisfies"):
            tiny.generate("abc", grammar=options)
    assert tiny.stats().steps == before


def test_streamed_text_is_never_taken_back(tiny: Model) -> None:
    schema: dict[str, Any] = {"type": "array", "items": {"type": "integer", "maximum": 3, "minimum": 0}}
    schema |= {"uniqueItems": True, "minItems": 3}
    rollbacks = 0
    for seed in range(6):
        options: dict[str, Any] = {"grammar": schema, "temperature": 1.5, "seed": seed, "max_tokens": 14}
        chunks = list(tiny.stream("abc", **options))
        whole = one(tiny.generate("abc", **options))
        assert "".join(chunk.text for chunk in chunks) == whole.text
        assert len(set(whole.parsed)) == len(whole.parsed)
        assert whole.trace is not None
        rollbacks += whole.trace.rollbacks
    assert rollbacks > 0  # the check behind the mask was needed


def test_forced_tokens_change_the_steps_and_nothing_else(tiny_dir: Any) -> None:
    """Bit for bit: with drafts and without, alone and in company."""
    options = {"grammar": PERSON, "temperature": 1.2, "max_tokens": 60, "logprobs": 2}
    with load(tiny_dir, threads=1, max_sequences=8) as fast, load(tiny_dir, threads=1, max_sequences=8) as slow:
        slow.worker._engine.drafter = None
        for seed in range(3):
            a = one(fast.generate("abc", seed=seed, **options))
            b = one(slow.generate("abc", seed=seed, **options))
            many = fast.generate(["abc", "xyz", "abc"], seed=seed, **options)
            for other in (b, many[0], many[2]):
                assert (a.text, a.token_ids, a.logprobs, a.trace) == (
                    other.text,
                    other.token_ids,
                    other.logprobs,
                    other.trace,
                )
        assert fast.stats().accepted_tokens > 0 == slow.stats().accepted_tokens
        assert fast.stats().steps < slow.stats().steps * 2


def test_choices_of_one_prompt_do_not_share_state(tiny: Model) -> None:
    options = {"grammar": {"regex": "[a-z]{4,9}"}, "temperature": 1.5, "seed": 3, "max_tokens": 30}
    several = tiny.generate("abc", n=4, **options)
    assert isinstance(several, list) and len({g.text for g in several}) > 1
    assert all(re.fullmatch("[a-z]{4,9}", g.text) for g in several)


def test_control_tokens_are_no_text(tiny: Model) -> None:
    """A pattern that spells a control token is written with letters, never with the token."""
    result = one(tiny.generate("abc", grammar={"regex": r"<\|im_end\|>!"}, max_tokens=30))
    assert result.text == "<|im_end|>!" and not set(result.token_ids) & tiny.tokenizer.special_ids


def test_text_between_the_bytes_of_a_character_can_be_closed(tiny: Model) -> None:
    grammar = compile(regex="(é|ü|€){3,30}")
    for limit in range(6, 14):
        result = one(tiny.generate("abc", grammar=grammar, temperature=2.0, seed=limit, max_tokens=limit))
        assert grammar.accepts(result.text) and result.completed


def test_a_stop_string_wins_and_the_text_is_not_whole(tiny: Model) -> None:
    result = one(tiny.generate("abc", grammar={"regex": "aaaabaaaa"}, stop="b", max_tokens=20))
    assert (result.text, result.finish_reason, result.completed, result.parsed) == ("aaaa", "stop", False, None)
    assert result.trace is not None and len(result.trace.kinds) == len(result.token_ids)


def test_what_the_grammar_kept_is_the_probability_of_what_it_allowed(tiny: Model) -> None:
    import torch

    result = one(tiny.generate("abc", grammar={"regex": "[ab]{3}"}, max_tokens=5))
    assert result.trace is not None
    probabilities = torch.softmax(tiny.logits("abc")[-1].double(), dim=-1)
    allowed = [i for i in range(tiny.tokenizer.vocab_size) if re.fullmatch(b"[ab]{1,3}", tiny.tokenizer.token_bytes(i))]
    assert result.trace.kept_mass[0] == pytest.approx(float(probabilities[allowed].sum()), rel=1e-5)


@pytest.mark.model
def test_the_real_vocabulary_gives_valid_json_and_canonical_tokens(smollm2: Model) -> None:
    for seed in range(1):
        result = one(smollm2.chat("Describe a person.", grammar=PERSON, temperature=1.0, seed=seed, max_tokens=30))
        assert compile(PERSON).accepts(result.text) and result.parsed["name"] is not None
        assert result.token_ids[:2] == smollm2.tokenizer.encode(result.text, add_special_tokens=False)[:2]


@pytest.mark.model
def test_the_large_vocabulary_works_too(gemma: Model) -> None:
    result = one(gemma.generate("Describe a person: ", grammar=PERSON, max_tokens=24))
    assert compile(PERSON).accepts(result.text)
