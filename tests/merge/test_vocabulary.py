"""Joined vocabularies: tables laid out by token, missing rows from where mergekit takes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import AddedToken, Tokenizer

import gnomon
from gnomon.errors import ConfigError
from gnomon.merge import merge
from helpers.tiny import write_tiny_model

EMBED = "model.embed_tokens.weight"


def model(path: Path, extra: list[str], seed: int, rows: int | None = None) -> Path:
    """A tiny model whose tokenizer has further control tokens, appended in this order."""
    backend_size = 3 + 256 + 8 + len(extra)
    write_tiny_model(path, seed=seed, vocab_size=rows or backend_size)
    backend = Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in extra])
    backend.save(str(path / "tokenizer.json"))
    assert backend.get_vocab_size(with_added_tokens=True) == backend_size
    return path


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("words")
    return model(root / "a", ["<x>", "<y>"], 1), model(root / "b", ["<y>", "<z>"], 2)


def linear(two: tuple[Path, Path], **more: Any) -> dict[str, Any]:
    models = [{"model": str(path), "parameters": {"weight": weight}} for path, weight in zip(two, (1, 3), strict=True)]
    return {"merge_method": "linear", "models": models} | more


def tables(two: tuple[Path, Path]) -> tuple[torch.Tensor, torch.Tensor]:
    a, b = (load_file(path / "model.safetensors")[EMBED] for path in two)
    return a, b


def test_a_union_aligns_rows_by_token_and_fills_what_one_lacks_from_the_other(two: tuple[Path, Path]) -> None:
    merged = merge(linear(two, tokenizer_source="union"))
    a, b = tables(two)
    ids = merged.tokenizer().backend.get_vocab(with_added_tokens=True)
    assert (ids["<x>"], ids["<y>"], ids["<z>"]) == (267, 268, 269)
    assert merged.config["vocab_size"] == 270 and merged[EMBED].shape == (270, 48)
    rows = merged[EMBED]
    assert torch.allclose(rows[:267], (a[:267] + 3 * b[:267]) / 4, atol=1e-6)
    assert torch.allclose(rows[268], (a[268] + 3 * b[267]) / 4, atol=1e-6)  # <y> stands at another id in b
    assert torch.allclose(rows[267], a[267], atol=1e-6) and torch.allclose(rows[269], b[268], atol=1e-6)
    assert merged["lm_head.weight"].shape == (270, 48)


def test_the_bases_vocabulary_and_its_rows_come_first(two: tuple[Path, Path]) -> None:
    based = {"merge_method": "task_arithmetic", "base_model": str(two[0])}
    models = [{"model": str(two[1]), "parameters": {"weight": 1.0}}]
    merged = merge(based | {"models": models, "tokenizer_source": "base"})
    a, b = tables(two)
    assert merged.config["vocab_size"] == 269
    assert torch.allclose(merged[EMBED][267], a[267], atol=1e-6)  # b lacks <x>: its row is the base's
    assert torch.allclose(merged[EMBED][268], b[267], atol=1e-6)


def test_rules_for_tokens_name_a_model_a_token_or_nothing(two: tuple[Path, Path]) -> None:
    tokens = {
        "<x>": {"source": {"kind": "zero"}, "force": True},
        "<z>": {"source": {"kind": "model_token", "model": str(two[0]), "token": "<y>"}},
        "<new>": {"source": {"kind": "model_token", "model": str(two[1]), "token_id": 5}},
    }
    merged = merge(linear(two, tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 16}))
    a, b = tables(two)
    ids = merged.tokenizer().backend.get_vocab(with_added_tokens=True)
    rows = merged[EMBED]
    assert rows.shape[0] == 272 and merged.config["vocab_size"] == 272
    assert not rows[ids["<x>"]].any()
    assert torch.allclose(rows[ids["<z>"]], (a[268] + 3 * b[268]) / 4, atol=1e-6)
    assert torch.allclose(rows[ids["<new>"]], b[5], atol=1e-6)
    with pytest.raises(ConfigError, match="has no token `<none>`"):
        bad = {"<q>": {"source": {"kind": "model_token", "model": str(two[0]), "token": "<none>"}}}
        merge(linear(two, tokenizer={"source": "union", "tokens": bad}))


def test_a_padded_table_keeps_its_size_and_its_rows(tmp_path: Path) -> None:
    pair = model(tmp_path / "a", ["<x>"], 1, rows=280), model(tmp_path / "b", ["<x>"], 2)
    based = {"merge_method": "task_arithmetic", "base_model": str(pair[0]), "tokenizer_source": "base"}
    merged = merge(based | {"models": [{"model": str(pair[1]), "parameters": {"weight": 1.0}}]})
    assert merged.config["vocab_size"] == 280
    assert torch.allclose(merged[EMBED][268:], tables(pair)[0][268:], atol=1e-6)


def test_a_written_union_loads_and_speaks(two: tuple[Path, Path], tmp_path: Path) -> None:
    content = linear(two, tokenizer_source="union", chat_template="chatml")
    lazy = merge(content)
    merge(content, out=tmp_path / "out")
    stored = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    assert stored.get_vocab(with_added_tokens=True) == lazy.tokenizer().backend.get_vocab(with_added_tokens=True)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 270
    with gnomon.load(tmp_path / "out", threads=1) as written, gnomon.load(lazy, threads=1) as computed:
        assert written.generate("abc<z>", max_tokens=4).token_ids == computed.generate("abc<z>", max_tokens=4).token_ids
        assert written.chat([{"role": "user", "content": "abc"}], max_tokens=2)


def words(path: Path, words_: list[str], seed: int) -> Path:
    """A tiny model whose BPE knows further words, by merges letter by letter."""
    write_tiny_model(path, seed=seed, vocab_size=400)
    content = json.loads((path / "tokenizer.json").read_text())
    vocabulary, merges = content["model"]["vocab"], content["model"]["merges"]
    for word in words_:
        for end in range(2, len(word) + 1):
            pair = [word[: end - 1], word[end - 1]]
            if "".join(pair) not in vocabulary:
                vocabulary["".join(pair)] = max(vocabulary.values()) + 1
                merges.append(pair)
    (path / "tokenizer.json").write_text(json.dumps(content))
    return path


def test_a_union_of_merges_speaks_both_vocabularies_without_matching_tokens_inside_of_words(tmp_path: Path) -> None:
    both = words(tmp_path / "a", ["gnomon"], 1), words(tmp_path / "b", ["shadow", "sha"], 2)
    merged = merge(linear(both, tokenizer={"source": "union", "merges": True}))
    backend = merged.tokenizer().backend
    assert backend.encode("gnomon").tokens == ["gnomon"] and backend.encode("shadow").tokens == ["shadow"]
    ids, (a, b) = backend.get_vocab(), tables(both)
    own = [Tokenizer.from_file(str(path / "tokenizer.json")).get_vocab() for path in both]
    assert torch.allclose(merged[EMBED][ids["shadow"]], b[own[1]["shadow"]], atol=1e-6)
    assert torch.allclose(merged[EMBED][ids["gnomon"]], a[own[0]["gnomon"]], atol=1e-6)
    plain = merge(linear(both, tokenizer_source="union")).tokenizer().backend
    donor = Tokenizer.from_file(str(both[0] / "tokenizer.json"))
    text = "the and in gnomon"  # words that both know are cut as the donor cuts them
    assert backend.encode(text).tokens == donor.encode(text).tokens
    assert "sha" in plain.encode("gasha").tokens  # an added token matches anywhere
    assert backend.decode(backend.encode("the shadow of a gnomon").ids) == "the shadow of a gnomon"
    with pytest.raises(ConfigError, match="needs `source: union`"):
        merge(linear(both, tokenizer={"source": "base", "merges": True}))
