"""Ordinary modules on the canonical operators: the engine's bits, gradients, and what is refused."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from gnomon.errors import UnsupportedModel, UsageError
from gnomon.kernels import canonical, coverage, library, native_reason
from gnomon.kernels.masks import plan_attention
from gnomon.loading import load
from helpers.tiny import write_tiny_model

FAMILIES = ("llama", "gemma3", "qwen2", "qwen3", "mistral")
LONG = [(7 + 13 * i) % 300 for i in range(150)]
SHORT = LONG[5:90]


def padded(left: bool) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, attention mask, positions) of both texts in one batch."""
    ids, mask = torch.zeros(2, 160, dtype=torch.long), torch.zeros(2, 160, dtype=torch.long)
    for row, text in enumerate((LONG, SHORT)):
        place = slice(160 - len(text), 160) if left else slice(0, len(text))
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


@pytest.mark.parametrize("profile", ["fp32", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_transformers_module_has_the_engines_bits_alone_padded_and_packed(
    family: str, profile: str, tmp_path: Path
) -> None:
    with load(write_tiny_model(tmp_path / family, family), threads=1, profile=profile) as model:
        long, short = model.logits(LONG), model.logits(SHORT)
        with model.module() as module, torch.no_grad(), canonical(profile):
            assert torch.equal(module(torch.tensor([LONG]), use_cache=False).logits[0], long)
            for left in (True, False):
                ids, mask, positions = padded(left)
                out = module(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
                for row, expected in enumerate((long, short)):
                    assert torch.equal(out[row][mask[row] == 1], expected), (left, row)
            both = torch.tensor([LONG + SHORT])
            places = torch.tensor([[*range(len(LONG)), *range(len(SHORT))]])
            packed = module(both, position_ids=places, use_cache=False).logits[0]
            assert torch.equal(packed, torch.cat([long, short]))


def test_without_the_block_the_module_is_what_it_was(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m"), threads=1) as model, model.module() as module, torch.no_grad():
        call, ids = nn.Module.__call__, torch.tensor([LONG])
        before = module(ids, use_cache=False).logits
        with canonical():
            inside = module(ids, use_cache=False).logits
            seen = []
            other = threading.Thread(target=lambda: seen.append(module(ids, use_cache=False).logits))
            other.start()
            other.join()
        assert nn.Module.__call__ is call
        assert torch.equal(module(ids, use_cache=False).logits, before)
        assert not torch.equal(inside, before), "stock torch has other bits: else this test shows nothing"
        assert torch.allclose(seen[0], before, atol=1e-4) and not torch.equal(seen[0], inside)
        assert all("forward" not in part.__dict__ for part in module.modules())


def test_hooks_run_on_replaced_modules(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m"), threads=1) as model, model.module() as module, torch.no_grad():
        seen: list[tuple[int, ...]] = []
        norm = module.get_submodule("model.norm")
        with norm.register_forward_hook(lambda part, inputs, output: seen.append(tuple(output.shape))), canonical():
            module(torch.tensor([LONG]), use_cache=False)
        assert seen == [(1, len(LONG), 48)]


# -- gradients ------------------------------------------------------------------------------------------------------


class Everything(nn.Module):
    """One of each covered operator."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.scale = nn.Embedding(20, 24), nn.LayerNorm(24), nn.RMSNorm(24, eps=1e-6)
        self.up, self.down = nn.Linear(24, 40), nn.Linear(40, 24, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        heads = self.norm(x).view(*ids.shape, 3, 8).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads * 0.5, heads, is_causal=True)
        x = x + mixed.transpose(1, 2).reshape(x.shape)
        wide = self.up(self.scale(x))
        x = x + self.down(nn.functional.silu(wide) + nn.functional.gelu(wide, approximate="tanh") * torch.sigmoid(wide))
        return torch.log_softmax(x.softmax(-1) + x @ self.up.weight[:24].t(), -1)


def test_gradients_are_those_of_stock_torch_up_to_rounding() -> None:
    torch.manual_seed(0)
    module, ids = Everything(), torch.randint(0, 20, (2, 70))
    target = torch.randn(2, 70, 24)

    def gradients() -> list[Tensor]:
        module.zero_grad()
        (module(ids) * target).sum().backward()
        return [parameter.grad.clone() for parameter in module.parameters()]  # type: ignore[union-attr]

    stock = gradients()
    with canonical():
        ours = gradients()
    for (name, _), a, b in zip(module.named_parameters(), stock, ours, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max().item()), name


def test_bf16_rounds_master_weights_forward_and_passes_the_gradient_on() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(5, 24)
    rounded = nn.Linear(24, 40)
    rounded.load_state_dict({name: t.bfloat16().float() for name, t in layer.state_dict().items()})
    with canonical("bf16"):
        y = layer(x)
        y.square().sum().backward()
    with canonical("fp32"):
        expected = rounded(x)
        expected.square().sum().backward()
    assert torch.equal(y, expected)
    assert torch.equal(layer.weight.grad, rounded.weight.grad)  # type: ignore[arg-type]


def attention_arguments() -> tuple[Any, ...]:
    plan = plan_attention(None, True, 1, 5, 5)
    parts = (plan.rows_T, plan.positions_T, plan.sequences_T, plan.tables_SP, plan.columns_N, plan.spans_S5)
    query, key, value = (torch.randn(1, heads, 5, 16, requires_grad=True) for heads in (4, 2, 2))
    return query, key, value, *parts, 0, 0.25


CALLS: dict[str, Callable[[], tuple[Any, ...]]] = {
    "linear": lambda: (
        torch.randn(3, 24, requires_grad=True),
        torch.randn(8, 24, requires_grad=True),
        torch.randn(8, requires_grad=True),
    ),
    "held": lambda: (torch.randn(3, 8, requires_grad=True),),
    "rms_norm": lambda: (torch.randn(3, 8, requires_grad=True), torch.randn(8, requires_grad=True), 1e-6),
    "layer_norm": lambda: (
        torch.randn(3, 8, requires_grad=True),
        torch.randn(8, requires_grad=True),
        torch.randn(8, requires_grad=True),
        1e-6,
    ),
    "softmax": lambda: (torch.randn(3, 8, requires_grad=True),),
    "log_softmax": lambda: (torch.randn(3, 8, requires_grad=True),),
    "activate": lambda: (torch.randn(3, 8, requires_grad=True), "gelu"),
    "attention": attention_arguments,
}


@pytest.mark.parametrize("name", CALLS)
def test_an_operator_is_registered_as_torch_asks(name: str) -> None:
    torch.manual_seed(0)
    arguments = (*CALLS[name](), "torch/fp32")
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(getattr(library, name), arguments, test_utils=tests)


@pytest.mark.skipif(native_reason() is not None, reason="no native kernels here")
@pytest.mark.parametrize("name", CALLS)
def test_native_and_torch_kernels_agree(name: str) -> None:
    torch.manual_seed(0)
    arguments = CALLS[name]()
    native, plain = (getattr(library, name)(*arguments, f"{kernel}/fp32") for kernel in ("native", "torch"))
    assert torch.allclose(native, plain, atol=1e-5)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_a_row_has_the_same_bits_in_any_company(kernel: str) -> None:
    if kernel == "native" and native_reason() is not None:
        pytest.skip("no native kernels here")
    torch.manual_seed(0)
    x, weight = torch.randn(67, 48) * 3, torch.randn(30, 48)
    scale, profile = torch.rand(48), f"{kernel}/fp32"
    rows: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda part: library.linear(part, weight, None, profile),
        "rms_norm": lambda part: library.rms_norm(part, scale, 1e-6, profile),
        "layer_norm": lambda part: library.layer_norm(part, scale, scale, 1e-6, profile),
        "softmax": lambda part: library.softmax(part, profile),
        "log_softmax": lambda part: library.log_softmax(part, profile),
        **{
            which: lambda part, which=which: library.activate(part, which, profile)  # type: ignore[misc]
            for which in ("silu", "gelu", "sigmoid")
        },
    }
    for name, operator in rows.items():
        whole = operator(x)
        for start, end in ((0, 1), (3, 4), (5, 8), (1, 67)):
            assert torch.equal(operator(x[start:end]), whole[start:end]), (name, start, end)


# -- coverage -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["exp", "log", "tanh", "sin", "cos", "rsqrt", "sqrt", "reciprocal", "pow", "div"])
def test_arithmetic_that_counts_as_element_by_element_is(name: str) -> None:
    """Vector body and scalar tail agree: any slice, any stride, the same bits."""
    torch.manual_seed(0)
    x = torch.rand(400) * 3 + 0.01
    second = {"pow": (3.0,), "div": (0.7,)}.get(name, ())
    whole = getattr(torch, name)(x, *second)
    for start, end in ((0, 1), (1, 18), (3, 40), (7, 107), (5, 400)):
        assert torch.equal(getattr(torch, name)(x[start:end].clone(), *second), whole[start:end])
    assert torch.equal(getattr(torch, name)(x[1::3], *second), whole[1::3])


class Odd(nn.Module):
    """A module with a reduction of its own, two floors down."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.ELU())
        self.pool = nn.AvgPool1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.inner(x)) / x.mean()


def test_every_operator_that_is_not_covered_is_named_with_its_module() -> None:
    report = coverage(Odd(), torch.randn(3, 8))
    assert not report.complete and "gnomon.linear.default" in report.covered
    found = {(operator.split(".")[1], place) for operator, place in report.uncovered}
    assert found == {("elu", "inner.1"), ("avg_pool2d", "pool"), ("mean", "")} or found == {
        ("elu", "inner.1"),
        ("avg_pool1d", "pool"),
        ("mean", ""),
    }


def test_a_module_with_an_uncovered_operator_is_refused() -> None:
    with canonical(), pytest.raises(UnsupportedModel, match=r"aten\.elu\.default in inner\.1"):
        Odd()(torch.randn(3, 8))
    with canonical(check=False):
        Odd()(torch.randn(3, 8))


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_the_erf_form_of_gelu_is_torchs_and_has_its_gradient(kernel: str) -> None:
    x = torch.cat([torch.linspace(-9, 9, 4001), torch.tensor([-1e30, -40.0, 0.0, 40.0, 1e30])]).requires_grad_()
    expected = nn.functional.gelu(x.detach().double())
    with canonical(kernel=kernel):
        y = nn.functional.gelu(x)
        assert torch.equal(nn.functional.gelu(x[7:40]), y[7:40])
    assert torch.allclose(y.double(), expected, rtol=1e-6, atol=1e-9)
    (found,) = torch.autograd.grad(y.sum(), x)
    other = x.detach().requires_grad_()
    (wanted,) = torch.autograd.grad(nn.functional.gelu(other).sum(), other)
    assert torch.equal(found, wanted)


def test_a_sentence_encoder_is_covered_and_keeps_its_bits_in_company() -> None:
    """BERT's parts: layer norms, erf-GELU, attention in both directions under a padding mask (MiniLM in the zoo)."""
    torch.manual_seed(0)
    config = BertConfig(vocab_size=90, hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=80)
    module = BertModel(config).eval()
    long, short = torch.randint(0, 90, (1, 150)), torch.randint(0, 90, (1, 70))
    both = torch.cat([long, nn.functional.pad(short, (0, 80))])
    mask = torch.tensor([[1] * 150, [1] * 70 + [0] * 80])
    with torch.no_grad(), canonical():
        alone = module(short).last_hidden_state
        together = module(both, attention_mask=mask).last_hidden_state
        assert torch.equal(together[1, :70], alone[0])
    with torch.no_grad():
        assert torch.allclose(module(short).last_hidden_state, alone, atol=1e-5)


def test_dropout_is_refused_in_training_and_free_in_evaluation() -> None:
    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    with canonical():
        module.eval()(torch.randn(2, 8))
    with canonical(), pytest.raises(UnsupportedModel, match="eval mode"):
        module.train()(torch.randn(2, 8))


def test_eager_attention_is_refused_with_what_to_do(tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / "m"), threads=1) as model, model.module() as module:
        module.config._attn_implementation = "eager"
        with torch.no_grad(), canonical(), pytest.raises(UnsupportedModel, match="attn_implementation='sdpa'"):
            module(torch.tensor([LONG]), use_cache=False)


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool(), "gaps"),
        (torch.tensor([[0.0, -1.0, 0.0]] * 3), "bias"),
        (torch.tensor([[1, 1, 0], [1, 1, 0], [1, 1, 1]]).bool(), "different keys"),
    ],
)
def test_a_mask_without_a_canonical_form_is_refused(mask: Tensor, why: str) -> None:
    x = torch.randn(1, 2, 3, 16)
    with canonical(), pytest.raises(UnsupportedModel, match=why):
        nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def test_attention_equals_stock_torch_for_every_kind_of_mask() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 130, 16) for heads in (4, 2, 2))
    place = torch.arange(130)
    causal = place <= place[:, None]
    window = causal & (place > place[:, None] - 40)
    left = causal & (place >= 33)
    packed = causal & ((place >= 71) == (place[:, None] >= 71))
    seen = torch.ones(130, 130, dtype=torch.bool)
    short = seen & (place < 100)
    for mask in (causal, window, left, packed, packed & window, seen, short):
        expected = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        with canonical():
            found = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        real = mask.any(-1)
        assert torch.allclose(found[:, :, real], expected[:, :, real], atol=1e-5)


def test_another_dtype_is_an_error() -> None:
    with pytest.raises(UsageError, match="int8"):
        canonical("int8")
