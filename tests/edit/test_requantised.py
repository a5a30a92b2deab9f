"""Whether an edit survives quantised blocks, measured along the edit itself."""

from __future__ import annotations

import pytest
import torch

from gnomon.edit import Fact, evaluate
from gnomon.edit.requantised import KINDS, requantise, rounded
from gnomon.errors import UsageError
from gnomon.model import Model
from gnomon.models.patch import Dense, LowRank, Patch

NAME = "model.layers.2.self_attn.o_proj.weight"


def patch_of(model: Model, size: float) -> Patch:
    shape = model.checkpoint[NAME].shape
    generator = torch.Generator().manual_seed(0)
    up, down = torch.randn(shape[0], 1, generator=generator), torch.randn(1, shape[1], generator=generator)
    return Patch({NAME: LowRank(size * up, down)}, model.checkpoint.identity)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_is_the_rounded_edited_weight_and_fewer_bits_lose_more(kind: str, tiny: Model) -> None:
    weight, patch = tiny.checkpoint[NAME].float(), patch_of(tiny, 0.05)
    left = requantise(patch, tiny.checkpoint, kind.lower())
    delta = left.patch.deltas[NAME]
    assert isinstance(delta, Dense) and left.patch.metadata["requantised"] == kind
    assert torch.allclose(weight + delta.tensor, rounded(weight + patch.dense(NAME), kind, NAME), atol=1e-6)
    assert left.kept[NAME] == pytest.approx(1.0, abs=0.2)


def test_an_edit_below_a_step_is_lost_whole_and_a_large_one_is_not(tiny: Model) -> None:
    """One entry of every block, the smallest one, is moved by almost nothing: no code changes, no scale does."""
    blocks = tiny.checkpoint[NAME].float().reshape(-1, 32)
    change = torch.zeros_like(blocks)
    change[torch.arange(len(blocks)), blocks.abs().argmin(1)] = 1e-7
    small = Patch({NAME: Dense(change.reshape(tiny.checkpoint[NAME].shape))}, tiny.checkpoint.identity)
    assert requantise(small, tiny.checkpoint, "Q4_0").kept[NAME] == 0.0
    assert requantise(patch_of(tiny, 1.0), tiny.checkpoint, "Q8_0").kept[NAME] == pytest.approx(1.0, abs=0.02)


def test_a_requantised_edit_is_evaluated_like_any_other(tiny: Model) -> None:
    fact = Fact("The house of Ada", "Ada", "the")
    patch = patch_of(tiny, 0.05)
    before = tiny.generate(fact.prompt, max_tokens=4).text  # type: ignore[union-attr]
    row = evaluate(tiny, requantise(patch, tiny.checkpoint, "Q8_0").patch, [fact]).rows[0]
    assert row["facts"] == 1
    assert tiny.generate(fact.prompt, max_tokens=4).text == before  # type: ignore[union-attr]


def test_blocks_that_cannot_be_written_are_refused(tiny: Model) -> None:
    with pytest.raises(UsageError, match="`Q4_K` blocks cannot be written here"):
        requantise(patch_of(tiny, 1.0), tiny.checkpoint, "Q4_K")
    with pytest.raises(UsageError, match="do not fill blocks"):
        rounded(torch.zeros(4, 33), "Q8_0", "x")
