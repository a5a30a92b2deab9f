"""Tokenizers: exact bytes, incremental decoding that equals whole decoding, and control text that stays plain."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.errors import PromptError, UnsupportedModel
from gnomon.model import Model
from gnomon.models.gguf_tokenizer import build
from gnomon.models.tokenizer import Tokenizer

TEXTS = [
    "Hello   world\n\n\n<b>x</b> 日本語",
    "def f(x):\n\treturn 12345+x  # ok",
    "été 😀👩‍👩‍👧 naïve   ",
    " leading, don't I'll WE'RE",
    "مرحبا بالعالم \u200b\u00a0x",
    "a" * 300,
]


@pytest.fixture(scope="module")
def tokenizer(tiny_dir: Path) -> Tokenizer:
    return Tokenizer.from_directory(tiny_dir)


@given(st.lists(st.integers(0, 266), max_size=30))
def test_pushed_pieces_join_to_the_decoded_whole_for_any_ids(tiny_dir: Path, ids: list[int]) -> None:
    tokenizer = Tokenizer.from_directory(tiny_dir)
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if not tokenizer.is_special(i)).decode("utf-8", "replace")
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids) == whole


@given(st.text(max_size=60))
def test_text_survives_the_round_trip(tiny_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_directory(tiny_dir)
    ids = tokenizer.encode(text, add_special_tokens=False, parse_special=False)
    assert tokenizer.decode(ids) == text


def test_no_character_leaves_before_it_is_complete(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("é😀", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push(i) for i in ids] == ["", "é", "", "", "", "😀"]


def test_a_snapshot_restores_an_open_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    detokenizer.push(ids[0])
    state = detokenizer.snapshot()
    twin = detokenizer.copy()
    detokenizer.finish()
    detokenizer.restore(state)
    assert "".join(map(detokenizer.push, ids[1:])) == "😀" == "".join(map(twin.push, ids[1:]))


def test_control_text_is_a_control_token_only_where_it_is_meant(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [2]
    plain = tokenizer.encode("<|im_end|>", add_special_tokens=False, parse_special=False)
    assert 2 not in plain and tokenizer.decode(plain) == "<|im_end|>"


def test_broken_unicode_and_foreign_ids_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(PromptError, match="character 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(PromptError, match="outside the vocabulary"):
        tokenizer.token_bytes(10**6)


def test_an_unknown_gguf_vocabulary_is_named() -> None:
    with pytest.raises(UnsupportedModel, match="rwkv"):
        build({"tokenizer.ggml.model": "rwkv"})
    with pytest.raises(UnsupportedModel, match="exotic"):
        build({"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "exotic", "tokenizer.ggml.tokens": ["a"]})


SCORED = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{b:02X}>" for b in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁a",
        "▁ab",
    ],
    "tokenizer.ggml.scores": [0.0] * 259 + [-10.0, -11.0, -12.0, -3.0, -2.0, -1.0],
    "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * 6,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_a_scored_vocabulary_adds_bos_and_its_dummy_space_and_takes_the_space_away_again() -> None:
    tokenizer = build(SCORED | {"tokenizer.ggml.add_space_prefix": True})
    ids = tokenizer.encode("ab ab")
    assert [tokenizer.token_text(i) for i in ids] == ["<s>", " ab", " ab"]
    assert tokenizer.decode(ids) == "ab ab"
    assert tokenizer.decode(tokenizer.encode("é")) == "é"  # byte fallback
    bare = build(SCORED | {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False})
    assert [bare.token_text(i) for i in bare.encode("ab ab")] == ["ab", " ab"]


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2", "gemma"])
def test_the_real_tokenizers_give_every_text_back(name: str, request: pytest.FixtureRequest) -> None:
    model: Model = request.getfixturevalue(name)
    for text in TEXTS:
        ids = model.tokenizer.encode(text, add_special_tokens=False, parse_special=False)
        assert model.tokenizer.decode(ids) == text


@pytest.mark.model
def test_gemma_tokenizes_as_sentencepiece_does(gemma: Model) -> None:
    transformers = pytest.importorskip("transformers")
    path = gemma.checkpoint.path
    assert path is not None
    reference = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert gemma.tokenizer.encode(text, add_special_tokens=False) == reference.encode(
            text, add_special_tokens=False
        )
    assert gemma.tokenizer.encode("x")[0] == gemma.tokenizer.bos_token_id  # which transformers' GGUF loader drops


@pytest.mark.model
def test_smollm2_splits_digits_and_knows_its_turn_ends(smollm2: Model) -> None:
    tokenizer = smollm2.tokenizer
    assert [tokenizer.token_text(i) for i in tokenizer.encode("in 1984")] == ["in", " ", "1", "9", "8", "4"]
    assert {tokenizer.token_text(i) for i in tokenizer.eos_token_ids} >= {"<|im_end|>"}
    assert not tokenizer.add_bos


@settings(max_examples=20, deadline=None)
@given(st.text(max_size=200))
def test_encoding_is_a_function_of_the_text_alone(tiny_dir: Path, text: str) -> None:
    tokenizer = Tokenizer.from_directory(tiny_dir)
    assert tokenizer.encode(text) == tokenizer.encode(text)
