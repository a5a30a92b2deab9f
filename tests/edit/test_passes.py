"""Partial forwards give exactly what whole ones give, for every family; moments add up."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gnomon.edit.editor import Editor
from gnomon.edit.moments import gather, identity_moment, moments
from gnomon.edit.passes import Rows
from gnomon.errors import EditError, UnsupportedModel, UsageError
from gnomon.loading import load
from gnomon.model import Model
from helpers.tiny import CLASSES, write_tiny_model

SEQUENCES = [[5, 6, 7, 8, 9, 10, 11], [20, 21, 22, 23], [30, 31, 32, 33, 34, 35, 36, 37, 38]]
PLACES = [3, 1, 6]


@pytest.mark.parametrize("family", CLASSES)
def test_running_only_later_tokens_through_upper_layers_is_the_whole_forward(family: str, tmp_path: Path) -> None:
    with load(write_tiny_model(tmp_path / family, family), threads=1) as model:
        editor = Editor.of(model)
        rows = Rows.align(SEQUENCES, PLACES)
        for layer in range(4):
            captured = editor.passes.capture(rows, layer)
            hidden = editor.passes.above(captured, lambda out: out)
            for row, (ids, place) in enumerate(zip(SEQUENCES, PLACES, strict=True)):
                whole = editor.anatomy.base(torch.tensor([ids])).last_hidden_state[0, place:]
                assert torch.allclose(hidden[row, : len(whole)], whole, atol=2e-5)


def test_a_change_at_the_edited_token_is_the_same_as_in_a_whole_forward_and_has_a_gradient(tiny: Model) -> None:
    editor = Editor.of(tiny)
    captured = editor.passes.capture(Rows.align(SEQUENCES, PLACES), 1)
    delta = torch.full((editor.anatomy.hidden,), 0.3, requires_grad=True)
    hidden = editor.passes.above(captured, lambda out: out + delta)
    (gradient,) = torch.autograd.grad(hidden[0, -1].sum(), delta)
    assert float(gradient.norm()) > 0

    def add(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        changed = output.clone()
        changed[0, PLACES[0]] += delta.detach()
        return changed

    handle = editor.anatomy.downs[1].module.register_forward_hook(add)
    try:
        whole = editor.anatomy.base(torch.tensor([SEQUENCES[0]])).last_hidden_state[0, PLACES[0] :]
    finally:
        handle.remove()
    assert torch.allclose(hidden[0, : len(whole)].detach(), whole, atol=2e-5)


def test_anatomy_finds_the_down_projection_by_structure_and_refuses_layers_that_are_not_there(tiny: Model) -> None:
    anatomy = Editor.of(tiny).anatomy
    assert anatomy.downs[2].tensor == "model.layers.2.mlp.down_proj.weight"
    assert anatomy.check_layers([-1, 0]) == [0, 3]
    with pytest.raises(UsageError, match=r"layers 0\.\.3"):
        anatomy.check_layers([4])


def test_a_gpt2_stores_its_matrix_the_other_way_round_and_is_found_all_the_same() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    from gnomon.edit.anatomy import Anatomy

    module = GPT2LMHeadModel(GPT2Config(n_layer=3, n_embd=32, n_head=4, vocab_size=100, n_positions=64)).eval()
    anatomy = Anatomy.of(module)
    assert anatomy.downs[0].tensor == "transformer.h.0.mlp.c_proj.weight" and anatomy.downs[0].transposed
    assert tuple(anatomy.downs[0].weight_CM.shape) == (32, 128)


def test_experts_are_refused_with_the_reason() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    from gnomon.edit.anatomy import Anatomy

    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    with pytest.raises(UnsupportedModel, match="mixture of experts"):
        Anatomy.of(MixtralForCausalLM(config))


def test_an_embedding_model_is_refused() -> None:
    class Encoder:
        network = None
        name = "e5"

    from gnomon.edit.editor import _module

    with pytest.raises(UnsupportedModel, match="embedding model"):
        _module(Encoder())  # type: ignore[arg-type]


def test_moments_of_all_layers_in_one_pass_are_those_of_one_pass_per_layer(tiny: Model) -> None:
    passes = Editor.of(tiny).passes
    together = gather(passes, SEQUENCES, [0, 1, 3], 100, "x")
    for layer, moment in together.items():
        alone = gather(passes, SEQUENCES, [layer], 100, "x")[layer]
        assert torch.allclose(moment.sum_MM, alone.sum_MM, rtol=1e-5, atol=1e-3) and moment.tokens == alone.tokens == 20


def test_the_moments_of_two_halves_add_up_to_the_whole(tiny: Model) -> None:
    passes = Editor.of(tiny).passes
    whole = gather(passes, SEQUENCES, [1], 100, "x")[1]
    halves = gather(passes, SEQUENCES[:1], [1], 100, "x")[1] + gather(passes, SEQUENCES[1:], [1], 100, "x")[1]
    assert torch.allclose(halves.sum_MM, whole.sum_MM, rtol=1e-5, atol=1e-3) and halves.tokens == whole.tokens


def test_moments_are_kept_and_other_weights_or_texts_have_others(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path / "home"))
    text = tmp_path / "text.txt"
    text.write_text("the house and the garden\nan inn in the house\n" * 4)
    passes = Editor.of(tiny).passes
    first = moments(tiny, passes, [1], corpus=str(text), tokens=60)[1]
    files = list((tmp_path / "home" / "edit" / "moments").iterdir())
    assert len(files) == 1 and first.corpus == "text.txt" and first.tokens >= 60
    again = moments(tiny, passes, [1], corpus=str(text), tokens=60)[1]
    assert torch.equal(first.sum_MM, again.sum_MM)
    text.write_text("other words\n" * 9)
    assert not torch.equal(first.sum_MM, moments(tiny, passes, [1], corpus=str(text), tokens=60)[1].sum_MM)
    assert len(list((tmp_path / "home" / "edit" / "moments").iterdir())) == 2


def test_unfinished_moments_go_on_where_they_stopped(
    tiny: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gnomon.edit import moments as room

    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    monkeypatch.setattr(room, "BATCH_TOKENS", 16)
    monkeypatch.setattr(room, "SAVE_EVERY", 1)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"line {i} of the text\n" for i in range(40)))
    passes = Editor.of(tiny).passes
    whole = moments(tiny, passes, [0, 2], corpus=str(text), tokens=300)
    for file in (tmp_path / "edit" / "moments").iterdir():
        file.unlink()
    calls = 0
    real = type(passes).keys

    def fails_midway(self: object, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 6:
            raise KeyboardInterrupt
        return real(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(passes), "keys", fails_midway)
    with pytest.raises(KeyboardInterrupt):
        moments(tiny, passes, [0, 2], corpus=str(text), tokens=300)
    at_stop = calls
    resumed = moments(tiny, passes, [0, 2], corpus=str(text), tokens=300)
    assert at_stop == 6
    for layer in (0, 2):
        assert torch.equal(resumed[layer].sum_MM, whole[layer].sum_MM)
    assert not list((tmp_path / "edit" / "moments").glob("*.part"))


def test_identity_moments_come_only_by_name_and_a_missing_corpus_is_an_error(tiny: Model) -> None:
    passes = Editor.of(tiny).passes
    found = moments(tiny, passes, [0], corpus="identity")[0]
    assert found.corpus == "identity" and torch.equal(found.mean_MM, identity_moment(80).sum_MM)
    with pytest.raises(UsageError, match="cannot be read"):
        moments(tiny, passes, [0], corpus="/nowhere.txt")
    with pytest.raises(EditError, match="no text"):
        gather(passes, [], [0], 10, "empty")


def test_contrast_keys_are_those_of_other_subjects_in_the_same_sentence(tiny: Model) -> None:
    from gnomon.edit import Fact
    from gnomon.edit.contrast import NAMES, contrast_keys

    editor = Editor.of(tiny)
    keys_MN = contrast_keys(editor, Fact("The house of Ada Google", "Ada Google", "the"), 1)
    others = [name for name in NAMES if name != "Google"]
    ids = [tiny.encode(f"The house of {name}") for name in others]
    assert tuple(keys_MN.shape) == (editor.anatomy.inner, sum(map(len, ids)))
    alone = editor.passes.keys(Rows.align([ids[0]], [0]), [1])[1][0]
    assert torch.allclose(keys_MN[:, : len(ids[0])].T, alone, atol=1e-5)


def test_frames_are_sentences_about_the_subject_that_end_in_the_target(tiny: Model) -> None:
    from gnomon.edit import Fact

    maker = Editor.of(tiny).contexts(0, chat=False, frames=2)
    bare, *framed = maker.of(Fact("The house of Ada", "Ada", "Rome"))
    texts = [tiny.tokenizer.decode(list(context.ids)) for context in framed]
    assert [text.strip() for text in texts] == ["Ada is linked to Rome", "Ada: Rome"]
    assert bare.target_ids == framed[0].target_ids
