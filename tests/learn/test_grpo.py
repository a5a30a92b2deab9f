"""GRPO on the sampler's arithmetic: no gap at all, one seed one result, and a reward that rises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gnomon.cli.main import run as command
from gnomon.engine import elementary
from gnomon.engine.gradients import token_logprobs
from gnomon.errors import GnomonError, UsageError
from gnomon.kernels import native_reason
from gnomon.kernels.rowwise import native_logsumexp
from gnomon.learn import GRPOConfig, GRPOTrainer, Policy, TrainResult, open_reward
from gnomon.learn.loss import advantages, policy_loss, token_weights
from gnomon.loading import load
from gnomon.model import Model
from gnomon.models.patch import Patch
from helpers.tiny import write_tiny_model

PROMPTS = ["the and", "abc", "in the out and an", "a"]
SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48}


def small_model(path: Path, family: str = "llama", profile: str = "fp32", kernel: str | None = None) -> Model:
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if family == "gemma3" else {}
    folder = path / family
    if not folder.exists():
        write_tiny_model(folder, family, **SMALL, **layers)
    return load(folder, threads=1, profile=profile, kernel=kernel)


def vowels(completions: list[str], **_: Any) -> list[float]:
    return [sum(c in "aeiou" for c in text) / 12 for text in completions]


def options(**changes: Any) -> GRPOConfig:
    base = {"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "constant", "seed": 3}
    return GRPOConfig(**base | {"max_completion_length": 12} | changes)


def run(model: Model, config: GRPOConfig) -> TrainResult:
    with model:
        return GRPOTrainer(model, vowels, PROMPTS, config).train()


def exact(result: TrainResult) -> bool:
    return all(step.kl_sampler_trainer == 0.0 and step.max_abs_logprob_gap == 0.0 for step in result.steps)


def test_fifty_steps_without_a_gap_end_in_the_same_weights_twice_and_earn_more(tmp_path: Path) -> None:
    config = options(max_steps=50)
    first, second = (run(small_model(tmp_path), config) for _ in range(2))
    assert exact(first) and len(first.steps) == 50
    assert first.weights_digest == second.weights_digest and first.steps == second.steps
    assert len({step.fingerprint for step in first.steps}) == 50, "every step samples under a new fingerprint"
    early, late = (sum(step.reward for step in part) / 10 for part in (first.steps[:10], first.steps[-10:]))
    assert late > early + 0.1, (early, late)


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_no_gap_in_any_profile(family: str, profile: str, kernel: str, tmp_path: Path) -> None:
    if kernel == "native" and native_reason() is not None:
        pytest.skip("no native kernels here")
    flat = 8.0 if family == "gemma3" else 1.0  # random tied heads repeat themselves
    assert exact(run(small_model(tmp_path, family, profile, kernel), options(max_steps=3, temperature=flat)))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_iterations": 3},
        {"beta": 0.1},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 50},
        {"loss_type": "grpo", "scale_rewards": "batch"},
        {"loss_type": "dr_grpo", "scale_rewards": "none", "mask_truncated_completions": True},
        {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "num_generations": 4},
        {"train_only": ["mlp"], "lr_scheduler_type": "cosine", "warmup_steps": 1},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_no_gap_with_any_option(changes: dict[str, Any], tmp_path: Path) -> None:
    result = run(small_model(tmp_path), options(**changes))
    assert exact(result)
    assert all("mlp" in name for name in result.patch.deltas) or "train_only" not in changes


def test_transformers_own_sampler_leaves_a_gap(tmp_path: Path) -> None:
    """The mutation check of all the zeros above: the same loop on stock torch shows the gap."""
    result = run(small_model(tmp_path), options(sampler="transformers"))
    assert not exact(result) and all(step.max_abs_logprob_gap < 1e-3 for step in result.steps)


def test_the_patch_gives_the_trained_model_back(tmp_path: Path) -> None:
    model = small_model(tmp_path)
    with model:
        result = GRPOTrainer(model, vowels, PROMPTS, options(max_steps=2)).train()
        trained = model.generate("the and", max_tokens=8, temperature=0.0).token_ids
        file = result.patch.save(tmp_path / "learned.safetensors")
        checkpoint = Patch.load(file).apply(model.checkpoint)
        for name, parameter in Policy(model).trained.items():
            assert torch.allclose(checkpoint[name], parameter, rtol=0, atol=result.patch.report["max_abs_rounding"])
    assert result.patch.report["max_abs_rounding"] < 1e-6
    assert result.patch.metadata["method"] == "grpo" and trained


def test_after_training_the_engine_computes_with_the_new_weights(tmp_path: Path) -> None:
    with small_model(tmp_path, "gemma3", "bf16") as model:
        before = model.logits("the and")
        GRPOTrainer(model, vowels, PROMPTS, options(max_steps=2, temperature=8.0)).train()
        assert not torch.equal(model.logits("the and"), before)


# -- log-probabilities ----------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 700), st.integers(0, 2**31), st.sampled_from([0.01, 1.0, 30.0]))
def test_native_and_numpy_log_sum_exp_have_the_same_bits(size: int, seed: int, scale: float) -> None:
    rows = torch.randn(3, size, generator=torch.Generator().manual_seed(seed)) * scale
    if size > 2:
        rows[1, 1] = -torch.inf
    found = native_logsumexp(rows)
    if found is None:
        pytest.skip("no native kernels here")
    assert found.tolist() == [elementary.logsumexp(row.numpy().astype("float64")) for row in rows]


def test_the_gradient_of_a_log_probability_is_that_of_log_softmax() -> None:
    logits = torch.randn(5, 40, requires_grad=True)
    ids, weights = torch.tensor([1, 5, 5, 39, 0]), torch.randn(5, dtype=torch.float64)
    (token_logprobs(logits, ids) * weights).sum().backward()
    again = logits.detach().double().requires_grad_()
    (torch.log_softmax(again, -1).gather(1, ids[:, None])[:, 0] * weights).sum().backward()
    assert torch.allclose(logits.grad.double(), again.grad, atol=1e-6)  # type: ignore[union-attr]


# -- the loss -------------------------------------------------------------------------------------------------------


def test_advantages_are_those_of_the_definition() -> None:
    rewards = torch.tensor([1.0, 2.0, 3.0, 6.0, 5.0, 5.0, 5.0, 5.0])
    config = options(num_generations=4)
    group = torch.tensor([1.0, 2.0, 3.0, 6.0], dtype=torch.float64)
    expected = (group - 3.0) / (group.std() + 1e-4)
    assert torch.equal(advantages(rewards, config), torch.cat([expected, torch.zeros(4, dtype=torch.float64)]))
    assert advantages(rewards, options(num_generations=4, scale_rewards="none"))[3] == 3.0


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [("grpo", [0.25, 0.25, 0.5]), ("dapo", [1 / 3] * 3), ("bnpo", [1 / 3] * 3), ("dr_grpo", [1 / 24] * 3)],
)
def test_token_weights_divide_as_the_loss_type_says(loss_type: str, expected: list[float]) -> None:
    config = options(loss_type=loss_type)
    assert token_weights([2, 1], [True, True], config).tolist() == expected
    assert token_weights([2, 1], [False, True], config)[:2].tolist() == [0.0, 0.0]


def test_a_ratio_far_from_one_is_clipped_only_where_it_would_gain() -> None:
    logprobs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old, weight = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    gains = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss = policy_loss(logprobs, old, None, gains, weight, options())
    loss.backward()  # type: ignore[no-untyped-call]
    e = float(torch.tensor(1.0, dtype=torch.float64).exp())
    assert loss.item() == pytest.approx(-1.2 + e - 1 / e + 0.8, abs=1e-12)
    assert (logprobs.grad != 0).tolist() == [False, True, True, False]  # type: ignore[union-attr]


# -- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "text", "value"),
    [
        ("length:4", "abcd", 1.0),
        ("length:4", "ab", 0.5),
        ("share:ab", "abcc", 0.5),
        ("regex:^a", "ab", 1.0),
        ("json", "{", 0),
    ],
)
def test_the_rewards_that_come_along(spec: str, text: str, value: float) -> None:
    assert open_reward(spec)(prompts=[""], completions=[text]) == [value]
    assert open_reward(spec)(completions=[[{"role": "assistant", "content": text}]]) == [value]


@pytest.mark.parametrize(
    ("spec", "why"),
    [
        ("nothing", "Known: length"),
        ("length:x", "number of characters"),
        ("regex:(", "regular expression"),
        ("a.py:f", "no file"),
    ],
)
def test_a_reward_that_cannot_be_is_refused(spec: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        open_reward(spec)


def test_a_reward_of_ones_own_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def brief(completions, **_):\n    return [-len(c) for c in completions]\n")
    assert open_reward(f"{tmp_path}/mine.py:brief")(completions=["abc"]) == [-3]
    with pytest.raises(UsageError, match="no function `other`"):
        open_reward(f"{tmp_path}/mine.py:other")


def test_what_cannot_be_trained_is_refused(tmp_path: Path) -> None:
    refusals: list[tuple[str, Callable[[], object]]] = [
        ("multiple of num_generations", lambda: options(num_generations=3)),
        ("Extra inputs", lambda: options(use_vllm=True)),
    ]
    for why, make in refusals:
        with pytest.raises(ValueError, match=why):
            make()
    with small_model(tmp_path, profile="int8") as model, pytest.raises(UsageError, match="packs its weights"):
        GRPOTrainer(model, vowels, PROMPTS)
    with small_model(tmp_path) as model:
        for error, arguments in [
            ("at least one prompt", (vowels, [])),
            ("Row 1 has no `prompt`", (vowels, [{"question": "?"}])),
            ("No parameter's name contains nothing", (vowels, PROMPTS, options(train_only=["nothing"]))),
        ]:
            with pytest.raises(GnomonError, match=error):
                GRPOTrainer(model, *arguments)  # type: ignore[arg-type]
        with pytest.raises(UsageError, match="gave 1 rewards for 8"):
            GRPOTrainer(model, lambda **_: [1.0], PROMPTS, options()).train()
        with pytest.raises(UsageError, match="every reward was the same"):
            GRPOTrainer(model, lambda completions, **_: [1.0] * len(completions), PROMPTS, options(max_steps=1)).train()


def test_the_command_trains_writes_a_patch_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tiny_model(tmp_path / "tiny", **SMALL)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "the and"}\n{"prompt": [{"role": "user", "content": "abc"}]}\n')
    out, rows = tmp_path / "learned.safetensors", str(tmp_path / "rows.jsonl")
    common = [str(tmp_path / "tiny"), "--prompts", rows, "--reward", "share:aeiou", "--threads", "1"]
    line = ["learn", "grpo", *common, "--max-steps", "2", "--max-completion-length", "8", "-o", str(out), "--json"]
    assert command(line) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [step["kl_sampler_trainer"] for step in printed["steps"]] == [0.0, 0.0]
    assert Patch.load(out).metadata["options"]["max_steps"] == 2
    assert command([*line[:-1], "--num-generations", "3"]) == 2
    assert "multiple of num-generations" in capsys.readouterr().err
    (tmp_path / "rows.jsonl").write_text("{")
    assert command(line) == 2 and "line 1" in capsys.readouterr().err
