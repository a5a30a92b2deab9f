"""Verified mode: stock torch kernels, one request one answer, and fast drafts that verified rows confirm."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.arch.transformers_network import TransformersNetwork
from gnomon.arch.verified_network import WINDOW, VerifiedNetwork
from gnomon.errors import UsageError
from gnomon.kernels import make_operators
from gnomon.kernels.batch import RaggedBatch, Span
from gnomon.loading import load
from gnomon.model import Model
from gnomon.models.reference import open_checkpoint
from helpers.tiny import write_tiny_model

IDS = [(7 + 13 * i) % 300 for i in range(75)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A decoder that is none of ours: GPT-2."""
    transformers = pytest.importorskip("transformers")
    path = write_tiny_model(tmp_path_factory.mktemp("models") / "gpt2")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_positions=256, n_embd=48, n_layer=2, n_head=4)
    transformers.GPT2LMHeadModel(config).save_pretrained(path)
    return path


@pytest.fixture
def verified(folder: Path) -> Iterator[Model]:
    with load(folder, threads=1, determinism="verified") as model:
        yield model


def rows(network: TransformersNetwork, pieces: list[int], sequence: int = 0) -> torch.Tensor:
    out, start = [], 0
    for count in pieces:
        batch = RaggedBatch.build([Span(sequence, IDS[start : start + count], start, [0, 1], "all")])
        out.append(network.forward(batch, []))
        start += count
    return torch.cat(out)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_row_has_the_same_bits_however_its_text_was_cut(folder: Path, dtype: str) -> None:
    network = VerifiedNetwork(open_checkpoint(folder), make_operators(dtype, threads=1))
    whole = rows(network, [75])
    for sequence, pieces in enumerate(([1] * 75, [WINDOW, WINDOW, 11], [31, 2, 42], [74, 1]), 1):
        assert torch.equal(rows(network, pieces, sequence), whole), pieces


def test_without_the_one_shape_the_bits_follow_the_cutting(folder: Path) -> None:
    """The mutation check: transformers as it is."""
    network = TransformersNetwork(open_checkpoint(folder), make_operators("fp32", threads=1))
    assert not torch.equal(rows(network, [75]), rows(network, [1] * 75, 1))


def test_a_text_that_was_rolled_back_goes_on_with_the_right_bits(folder: Path) -> None:
    network = VerifiedNetwork(open_checkpoint(folder), make_operators("fp32", threads=1))
    whole = rows(network, [75])
    for start in (70, 64, 40, 33):
        wrong = Span(9, [5] * 6, start, [0, 1], "all")
        rows(network, [75], 9)
        network.forward(RaggedBatch.build([wrong]), [])
        right = RaggedBatch.build([Span(9, IDS[start:], start, [0, 1], "all")])
        assert torch.equal(network.forward(right, []), whole[start:]), start


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_one_request_has_one_answer_and_drafts_are_confirmed(verified: Model, folder: Path, temperature: float) -> None:
    options: dict[str, Any] = {
        "max_tokens": 40,
        "temperature": temperature,
        "seed": 4,
        "ignore_eos": True,
        "logprobs": 0,
    }
    before = verified.stats()
    alone = verified.generate(IDS[:20], **options)
    after = verified.stats()
    assert after.accepted_tokens > before.accepted_tokens, "drawn with the request's own noise, guesses come true"
    assert after.steps - before.steps < 20
    crowd = verified.generate([IDS[:20], IDS[5:70], IDS[:3]], **options)
    with load(folder, threads=1, determinism="verified", speculation="off", token_budget=16) as plain:
        undrafted = plain.generate(IDS[:20], **options)
        assert plain.fingerprint == verified.fingerprint
    for other in (crowd[0], undrafted):
        assert (other.token_ids, other.logprobs) == (alone.token_ids, alone.logprobs)


def test_each_kind_of_determinism_says_what_it_cannot_do(folder: Path, tiny_dir: Path) -> None:
    with pytest.raises(UsageError, match="cannot promise exact bits"):
        load(folder, threads=1, determinism="exact")
    with pytest.raises(UsageError, match="exact already"):
        load(tiny_dir, threads=1, determinism="verified")
    with pytest.raises(UsageError, match="Unknown determinism `perhaps`"):
        load(tiny_dir, threads=1, determinism="perhaps")
    with load(folder, threads=1, determinism="fast") as fast, load(folder, threads=1, determinism="verified") as slow:
        assert fast.fingerprint != slow.fingerprint


def test_its_certificate_tries_company_chunks_and_drafts_beside_running_requests(
    verified: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_tokens": 12, "seed": 3, "temperature": 0.8, "ignore_eos": True, "logprobs": 0}
    alone = verified.generate(IDS[:20], **options)
    running = verified.submit(IDS[:20], options)
    certificate = verified.certificate(renew=True)
    assert certificate.passed and [probe.name for probe in certificate.probes] == ["the sampler", "the engine"]
    (again,) = running.collect()
    assert (again.token_ids, again.logprobs) == (alone.token_ids, alone.logprobs)
    monkeypatch.setattr(VerifiedNetwork, "_run", TransformersNetwork._run)  # the mutation check: any shape
    assert not verified.certificate(renew=True).passed


def test_the_mode_is_a_flag_and_a_recipe_key(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from gnomon.cli.main import run

    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"gnomon: 1\nmodel: {folder}\ndeterminism: verified\nthreads: 1\n")
    with load(recipe) as model:
        assert isinstance(model.network, VerifiedNetwork)
    asked = ["generate", "abc", "-m", str(folder), "--threads", "1", "--max-tokens", "2", "--determinism"]
    assert run([*asked, "verified"]) == 0
    assert run([*asked, "exact"]) == 2 and "cannot promise exact bits" in capsys.readouterr().err
