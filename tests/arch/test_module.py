"""The transformers module over the network's own memory, and decoders that only transformers knows."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import gnomon
from gnomon.errors import UnsupportedModel, UsageError
from helpers.tiny import tiny_tokenizer, write_tiny_model

transformers = pytest.importorskip("transformers")
IDS = [5, 17, 200, 9, 33]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(("profile", "kernel"), [("fp32", "torch"), ("bf16", "torch"), ("fp32", None), ("bf16", None)])
def test_the_module_shares_memory_and_gives_the_same_logits(
    family: str, profile: str, kernel: str | None, tmp_path: Path
) -> None:
    folder = write_tiny_model(tmp_path / "m", family)
    with gnomon.load(folder, profile=profile, threads=1, kernel=kernel) as model:
        ours = model.logits(IDS)
        with model.module() as module:
            assert model.network is not None
            live = model.network.tensors()
            for name, parameter in module.named_parameters():
                assert parameter.data_ptr() == live[name].data_ptr(), name
            with torch.no_grad():
                theirs = module(torch.tensor([IDS])).logits[0]
        # Native bf16 weights lie in bf16, so the module computes in bf16, we in float32.
        tolerance = 0.15 if theirs.dtype == torch.bfloat16 else 2e-4
        assert (ours - theirs).abs().max() <= tolerance * theirs.float().std()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_is_changed_in_the_module_is_seen_by_the_engine(family: str, tmp_path: Path) -> None:
    with gnomon.load(write_tiny_model(tmp_path / "m", family), threads=1) as model:
        before, fingerprint = model.logits(IDS), model.fingerprint
        with model.module():
            pass
        assert model.fingerprint == fingerprint
        with model.module() as module, torch.no_grad():
            module.model.norm.weight.mul_(2.0)
            module.model.layers[1].mlp.down_proj.weight.add_(0.1)
        assert model.fingerprint != fingerprint
        after = model.logits(IDS)
        assert not torch.equal(before, after)
        with model.module() as module, torch.no_grad():
            assert (module(torch.tensor([IDS])).logits[0] - after).abs().max() <= 1e-3 * after.std()


def test_generating_inside_the_block_is_an_error_and_not_a_deadlock(tmp_path: Path) -> None:
    with gnomon.load(write_tiny_model(tmp_path / "m"), threads=1) as model:
        with model.module(), pytest.raises(UsageError, match="wait for itself"):
            model.generate("abc", max_tokens=1)
        assert model.generate("abc", max_tokens=1).token_ids


def test_gradients_flow_through_the_module(tmp_path: Path) -> None:
    with gnomon.load(write_tiny_model(tmp_path / "m"), threads=1) as model, model.module() as module:
        module(torch.tensor([IDS]), labels=torch.tensor([IDS])).loss.backward()
        assert module.model.layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


@pytest.fixture
def gpt2(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=200)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    tiny_tokenizer().save(str(tmp_path / "gpt2" / "tokenizer.json"))
    return tmp_path / "gpt2"


def test_any_other_decoder_runs_through_transformers_and_says_so(gpt2: Path, caplog: pytest.LogCaptureFixture) -> None:
    with gnomon.load(gpt2, threads=1, max_sequences=2, token_budget=7) as model:
        assert "slower" in caplog.text
        results = model.generate([IDS * 4, IDS, IDS * 4], max_tokens=12, ignore_eos=True)
        reference = transformers.GPT2LMHeadModel.from_pretrained(gpt2)
        for prompt, result in zip([IDS * 4, IDS, IDS * 4], results, strict=True):
            expected = reference.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
            assert result.token_ids == expected[0, len(prompt) :].tolist()
        assert model.network is not None and not model.network._caches  # type: ignore[attr-defined]


def test_packed_profiles_name_the_profiles_that_can_share(gpt2: Path) -> None:
    with pytest.raises((UsageError, UnsupportedModel), match=r"fp32|bf16"):
        gnomon.load(gpt2, profile="int8")
