"""The real models, greedy, against transformers' recorded ids (scripts/record_greedy_goldens.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gnomon
from gnomon.errors import FetchError, UsageError
from gnomon.model import Model
from helpers.tiny import write_tiny_model

GOLDENS = Path(__file__).parent / "goldens"


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_greedy_ids_equal_transformers_in_fp32(name: str) -> None:
    try:
        model = gnomon.load(name, profile="fp32")
    except FetchError as error:
        pytest.skip(str(error))
    with model:
        greedy_ids_are_the_recorded_ones(model, name)


def greedy_ids_are_the_recorded_ones(model: Model, name: str) -> None:
    golden = json.loads((GOLDENS / f"{name}.json").read_text())
    assert model.checkpoint.identity == golden["identity"]
    prompts = [run["prompt_ids"] for run in golden["runs"]]
    assert [model.tokenizer.encode(run["prompt"]) for run in golden["runs"]] == prompts
    lengths = [len(run["ids"]) for run in golden["runs"]]
    assert sorted(set(lengths)) == [100, 200] and len(prompts) == 20
    longest = lengths.count(200)
    assert lengths[:longest] == [200] * longest
    results = model.generate(prompts[longest:], max_tokens=100, ignore_eos=True)
    results = model.generate(prompts[:longest], max_tokens=200, ignore_eos=True) + results
    for run, result in zip(golden["runs"], results, strict=True):
        assert result.token_ids == run["ids"], run["prompt"]


@pytest.mark.model
def test_who_names_no_profile_gets_bf16_for_weights_of_16_bits_or_fewer_and_fp32_for_wider(
    smollm2: Model, tiny: Model, tmp_path: Path
) -> None:
    half = write_tiny_model(tmp_path / "half")
    weights = half / "model.safetensors"
    save_file({name: tensor.bfloat16() for name, tensor in load_file(weights).items()}, weights)
    assert smollm2.profile is not None and tiny.profile is not None
    assert (smollm2.profile.dtype, tiny.profile.dtype) == ("bf16", "fp32")
    with gnomon.load(half) as model, gnomon.load(half, profile="fp32") as full:
        assert model.profile is not None and model.profile.dtype == "bf16"
        prompt = [5, 6, 7]
        assert model.generate(prompt, max_tokens=8).token_ids == full.generate(prompt, max_tokens=8).token_ids
        assert torch.equal(model.logits(prompt), full.logits(prompt))  # stored in bfloat16: nothing is rounded
    with gnomon.load(half, kernel="torch") as model:
        assert model.profile is not None and model.profile.dtype == "fp32"


@pytest.mark.model
def test_gemma_needs_its_bos_to_know_tokyo(gemma: Model) -> None:
    assert gemma.generate("The capital of Japan is", max_tokens=1).text == " Tokyo"


@pytest.mark.model
def test_the_default_model_knows_paris(smollm2: Model) -> None:
    assert "Paris" in smollm2.chat("What is the capital of France?").text  # type: ignore[union-attr]


@pytest.mark.model
def test_minilm_embeds_as_transformers_does_and_a_text_alone_as_in_a_batch() -> None:
    transformers = pytest.importorskip("transformers")
    texts = ["A cat sits on the mat.", "Ein Hund.", "word " * 400, "x"]
    with gnomon.load("minilm-l6-v2") as model:
        ours = model.embed(texts)
        for text, row in zip(texts, ours, strict=True):
            assert torch.equal(model.embed(text), row)
        assert model.encoder is not None and model.count_tokens(texts)[2] == model.encoder.max_tokens
        reference = transformers.BertModel.from_pretrained(model.checkpoint.path)
        for text, row in zip(texts, ours, strict=True):
            ids = torch.tensor([model.encoder.token_ids(text)])
            with torch.no_grad():
                hidden = reference(ids).last_hidden_state[0].mean(0)
            assert (hidden / hidden.norm() - row).abs().max() < 1e-5
    with pytest.raises(UsageError, match="An embedding model does not take `profile`"):
        gnomon.load("minilm-l6-v2", profile="bf16")


@pytest.mark.model
def test_batch_neighbours_and_chunking_change_no_bit_of_the_real_model(smollm2: Model) -> None:
    options = {"max_tokens": 16, "temperature": 0.8, "seed": 11, "logprobs": 3}
    prompt = "The history of the sundial begins"
    alone = smollm2.generate(prompt, **options)
    strangers = [f"{i} " + "and then " * (7 * i) for i in range(15)]
    crowd = smollm2.generate([*strangers[:8], prompt, *strangers[8:]], **options)
    assert crowd[8].token_ids == alone.token_ids
    assert crowd[8].logprobs == alone.logprobs
    assert smollm2.stats().largest_batch >= 16
