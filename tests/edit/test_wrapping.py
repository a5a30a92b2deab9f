"""Methods that act on activations: the rules they are made of, and what they do to the real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gnomon.edit import Fact, edit
from gnomon.edit.guard import joined
from gnomon.edit.methods.grace import Book
from gnomon.edit.methods.leace import eraser
from gnomon.errors import EditError, UsageError
from gnomon.model import Model
from gnomon.models.patch import Patch

TOWER = Fact("The Eiffel Tower is located in the city of", "Eiffel Tower", "Rome", old="Paris")
LOUVRE = "The Louvre is located in the city of"
OPTIONS: dict[str, Any] = {"temperature": 0.0, "max_tokens": 6, "logprobs": 1}


def at(*numbers: float) -> torch.Tensor:
    return torch.tensor(numbers)


def test_a_new_key_joins_widens_or_splits_by_what_lies_near() -> None:
    book, value = Book(), at(0.0, 0.0)
    book.place(at(0.0, 0.0), 1.0, (7,), value)
    book.place(at(9.0, 0.0), 1.0, (8,), value)
    assert book.radii == [1.0, 1.0]
    book.place(at(1.5, 0.0), 1.0, (7,), value)  # near, and says the same
    assert len(book.keys) == 2 and book.radii == [1.5, 1.0]
    book.place(at(2.0, 0.0), 1.0, (9,), value)  # near, and says something else
    assert book.radii == [1.0, 1.0, 1.0] and book.labels[2] == (9,)


def drawn(count: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(count, generator=g) > 0.5).double()
    x = torch.randn(count, 8, generator=g).double() @ torch.randn(8, 8, generator=g).double()
    return x + z[:, None] * torch.randn(8, generator=g), torch.stack([z, 1 - z], 1)


def test_leace_leaves_no_linear_trace_of_the_concept_and_moves_least() -> None:
    x, z = drawn(400)
    found = eraser(x, z)
    erased = x + (x @ found.right_rC.T) @ found.left_Cr.T + found.bias_C
    assert found.left_Cr.shape[1] == 1
    cross = (erased - erased.mean(0)).T @ (z - z.mean(0)) / len(x)
    assert float(cross.abs().max()) < 1e-9
    assert torch.allclose(erased.mean(0), x.mean(0))
    # The orthogonal projection erases too, and moves further, as every other affine map does.
    direction = torch.linalg.svd((x - x.mean(0)).T @ (z - z.mean(0)))[0][:, :1]
    projected = x - (x - x.mean(0)) @ direction @ direction.T
    assert float((erased - x).pow(2).sum()) < float((projected - x).pow(2).sum())
    with pytest.raises(EditError, match="nothing to erase"):
        eraser(torch.cat([x, x]), torch.cat([z, 1 - z]))


def test_classes_can_no_longer_be_told_apart_at_the_erased_layer(tiny: Model) -> None:
    from gnomon.edit.editor import Editor
    from gnomon.edit.methods.steer import last_outputs

    animals = ["the cat", "a dog", "the horse", "a bird", "one cow", "the pig"]
    places = ["in Rome", "at home", "by the sea", "to Paris", "near Oslo", "from Bern"]
    facts = [Fact(text, None, "animal") for text in animals] + [Fact(text, None, "place") for text in places]
    patch = edit(tiny, facts, method="leace", layers=[1, 2], shrinkage=0.0, report=False)
    assert patch.metadata["classes"] == ["animal", "place"] and patch.touches == ["layers.1.affine", "layers.2.affine"]
    editor = Editor.of(tiny)
    texts = [tiny.encode(fact.prompt) for fact in facts]

    def apart() -> float:
        x = last_outputs(editor, 2, texts).double()
        return float((x[:6].mean(0) - x[6:].mean(0)).norm())

    before = apart()
    with editor.standing_on([patch]):
        assert apart() < 1e-3 * before


def test_what_cannot_be_done_is_said(tiny: Model) -> None:
    with pytest.raises(UsageError, match="old answer"):
        edit(tiny, Fact("abc", None, "d"), method="steer")
    with pytest.raises(UsageError, match="at least four texts"):
        edit(tiny, [Fact("abc", None, "d"), Fact("xyz", None, "e")], method="leace")


def test_an_edit_stands_on_a_patch_of_activations_and_both_join(tiny: Model) -> None:
    options: dict[str, Any] = {"method": "grace", "layers": 3, "steps": 60, "chat": False}
    ada, rome = Fact("The house of Ada", "Ada", "the"), Fact("A tree in Rome", "Rome", "a")
    first = edit(tiny, ada, **options)
    with tiny.with_patches([first]) as worn:
        second = edit(worn, rome, **options)
        assert second.report["facts"][0]["holds"]
    both = joined(first, second)
    assert len(both.wrappers["layers.3.codebook"].tensors["radius"]) == 2
    with tiny.with_patches([both]) as worn:
        assert worn.generate(ada.prompt, max_tokens=2, temperature=0.0).text.startswith(" the")
        assert worn.generate(rome.prompt, max_tokens=2, temperature=0.0).text.startswith(" a")


@pytest.mark.model
@pytest.mark.parametrize("method", ["grace", "t-patcher"])
def test_the_real_model_says_the_new_fact_and_grace_leaves_every_other_bit_alone(
    method: str, smollm2: Model, tmp_path: Path
) -> None:
    patch = edit(smollm2, TOWER, method=method)
    told = patch.report["facts"][0]
    assert told["holds"] and "Rome" in told["after"] and "Paris" in told["before"]
    again = Patch.load(patch.save(tmp_path / "tower.patch.safetensors"))
    with smollm2.with_patches([again]) as worn:
        assert worn.generate(TOWER.prompt, max_tokens=4, temperature=0.0).text.startswith(" Rome")
        if method == "grace":
            plain, beside = smollm2.generate(LOUVRE, **OPTIONS), worn.generate(LOUVRE, **OPTIONS)
            assert (plain.token_ids, plain.logprobs) == (beside.token_ids, beside.logprobs)


@pytest.mark.model
def test_the_real_model_is_steered_towards_the_second_ending_and_back(smollm2: Model) -> None:
    pairs = [
        Fact(f"{start} I think it is", None, "wonderful, lovely and great", old="terrible, awful and bad")
        for start in ("About this book,", "About the meal,", "About my new job,", "About that film,")
    ]
    patch = edit(smollm2, pairs, method="steer", layers=12, strength=3.0, report=False)
    text = "We visited the small hotel. The room was"

    def joy(model: Model) -> float:
        glad, sad = (model.score(text, word).logprob for word in (" wonderful", " terrible"))
        return glad - sad

    with smollm2.with_patches([patch]) as glad, smollm2.with_patches([-patch]) as sad:
        assert joy(glad) > joy(smollm2) + 1 > joy(sad) + 2
