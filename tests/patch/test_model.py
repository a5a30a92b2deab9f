"""Patches through the Model: per request, as a view that shares the weights, as a materialised reference, replayed."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import gnomon
from gnomon.errors import PatchError, PatchNotFound, UnsupportedModel, UsageError, WrongBase
from gnomon.ledger import Ledger, replay
from gnomon.model import Model
from gnomon.models.patch import Dense, LowRank, Patch
from gnomon.models.reference import open_checkpoint
from helpers.patches import random_patch
from helpers.tiny import write_tiny_model

OPTIONS = {"max_tokens": 12, "seed": 3, "temperature": 0.7, "logprobs": 1, "ignore_eos": True}


@pytest.fixture(scope="module")
def patch(tiny_dir: Path) -> Patch:
    return random_patch(open_checkpoint(tiny_dir), 1)


@pytest.fixture(scope="module")
def file(patch: Patch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return patch.save(tmp_path_factory.mktemp("patches") / "one.patch.safetensors")


@pytest.fixture
def model(tiny_dir: Path, file: Path) -> Iterator[Model]:
    with gnomon.load(tiny_dir, threads=1, max_sequences=8) as model:
        model.patches.add("one", file)
        yield model


def same(a, b) -> bool:
    return (a.text, a.token_ids, a.logprobs) == (b.text, b.token_ids, b.logprobs)


def test_a_request_names_a_patch_and_the_next_one_is_as_if_it_had_never_been(model: Model, tiny: Model) -> None:
    plain = tiny.generate("abc", **OPTIONS)
    patched = model.generate("abc", **OPTIONS, patches=["one"])
    assert same(model.generate("abc", **OPTIONS), plain)
    assert patched.token_ids != plain.token_ids
    assert same(model.generate("abc", **OPTIONS, patches=["one"]), patched)
    assert plain.fingerprint == model.fingerprint != patched.fingerprint


def test_a_view_shares_the_weights_and_equals_the_request_that_names_the_patch(model: Model, patch: Patch) -> None:
    named = model.generate("abc", **OPTIONS, patches=["one"])
    view = model.with_patches([patch])
    assert same(view.generate("abc", **OPTIONS), named)
    assert view.fingerprint == named.fingerprint == view.generate("abc", **OPTIONS).fingerprint
    assert view.network is model.network and view.worker is model.worker
    assert view.checkpoint is model.checkpoint
    assert torch.equal(view.logits("abc"), model.with_patches(["one"]).logits("abc"))
    assert not torch.equal(view.logits("abc"), model.logits("abc"))
    assert view.score("abc", "def").logprob != model.score("abc", "def").logprob
    assert not torch.equal(view.embed("abc"), model.embed("abc"))
    view.close()
    with pytest.raises(UsageError, match="closed"):
        view.generate("abc")
    assert model.generate("abc", **OPTIONS).text


def test_beside_and_inside_the_weights_have_different_names(
    model: Model, tiny_dir: Path, patch: Patch, file: Path
) -> None:
    with gnomon.load(f"{tiny_dir}+{file}", threads=1, max_sequences=2) as inside:
        view = model.with_patches([patch])
        assert len({inside.fingerprint, view.fingerprint, model.fingerprint}) == 3
        assert inside.checkpoint.identity == patch.apply(model.checkpoint).identity
        change = inside.logits("abc") - model.logits("abc")
        assert (inside.logits("abc") - view.logits("abc")).abs().max() < 1e-3 * change.abs().max()
        assert inside.checkpoint.reference == f"{tiny_dir}+{file}"


def test_stacked_patches_count_in_order(model: Model, tiny_dir: Path) -> None:
    other = random_patch(open_checkpoint(tiny_dir), 2)
    model.patches.add("two", other)
    both = model.generate("abc", **OPTIONS, patches=["one", "two"])
    turned = model.generate("abc", **OPTIONS, patches=["two", "one"])
    assert both.fingerprint != turned.fingerprint
    view = model.with_patches(["one"])
    assert same(view.generate("abc", **OPTIONS, patches=["two"]), both)
    assert view.generate("abc", **OPTIONS, patches=["two"]).fingerprint == both.fingerprint


def test_a_patch_made_on_a_patched_model_stacks_on_it(model: Model, patch: Patch) -> None:
    on_top = random_patch(patch.apply(model.checkpoint), 7)
    with pytest.raises(WrongBase):
        model.with_patches([on_top])
    view = model.with_patches([patch, on_top])
    joined = (patch + on_top).apply(model.checkpoint)
    with gnomon.load(joined, threads=1, max_sequences=2) as inside:
        assert (view.logits("abc") - inside.logits("abc")).abs().max() < 1e-2


def test_patched_and_unpatched_requests_run_in_one_batch_bit_for_bit(model: Model) -> None:
    prompts = [f"prompt {i}" * 3 for i in range(6)]
    alone = [model.generate(p, **OPTIONS, patches=["one"] if i % 2 else []) for i, p in enumerate(prompts)]
    handles = [model.submit(p, {**OPTIONS, "patches": ["one"] if i % 2 else []}) for i, p in enumerate(prompts)]
    together = [handle.collect()[0] for handle in handles]
    assert all(map(same, alone, together))
    assert model.stats().largest_batch > 1


def test_patches_come_and_go_while_requests_run(model: Model, tiny_dir: Path, patch: Patch) -> None:
    expected = model.generate("abc", **OPTIONS | {"max_tokens": 200}, patches=["one"])
    plain = model.generate("abc", **OPTIONS | {"max_tokens": 200})
    stop, failures = threading.Event(), []

    def churn() -> None:
        count = 0
        while not stop.is_set():
            name = f"churn{count % 3}"
            try:
                model.patches.add(name, random_patch(open_checkpoint(tiny_dir), count))
                model.generate("x", max_tokens=2, patches=[name])
                model.patches.remove(name)
            except Exception as error:
                failures.append(error)
            count += 1

    thread = threading.Thread(target=churn)
    thread.start()
    handle = model.submit("abc", {**OPTIONS, "max_tokens": 200, "patches": ["one"]})
    model.patches.remove("one")
    assert same(handle.collect()[0], expected)
    assert same(model.generate("abc", **OPTIONS | {"max_tokens": 200}), plain)
    stop.set()
    thread.join()
    assert failures == []
    with pytest.raises(PatchNotFound):
        model.generate("abc", patches=["one"])


def test_what_cannot_run_beside_the_weights_is_refused_with_the_way_out(model: Model) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    dense = Patch({name: Dense(torch.ones(80, 48))}, model.checkpoint.identity)
    with pytest.raises(PatchError, match=r"dense.*to_low_rank"):
        model.with_patches([dense])
    assert model.with_patches([dense.to_low_rank(rank=1)]).generate("abc", max_tokens=1)
    with pytest.raises(WrongBase):
        model.patches.add("other", Patch({name: Dense(torch.ones(80, 48))}, "0" * 64).to_low_rank(rank=1))
    with pytest.raises(UsageError, match="no name"):
        model.patches.add("../x", dense.to_low_rank(rank=1))
    with pytest.raises(UsageError, match="taken"):
        model.patches.add("one", dense.to_low_rank(rank=1))


def test_the_operator_may_name_files_and_a_recipe_may_switch_them_on(
    model: Model, tiny_dir: Path, file: Path, tmp_path: Path
) -> None:
    named = model.generate("abc", **OPTIONS, patches=["one"])
    assert same(model.generate("abc", **OPTIONS, patches=[str(file)]), named)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"gnomon: 1\nmodel: {tiny_dir}\npatches: [{file}]\n")
    with gnomon.load(recipe, threads=1, max_sequences=2) as opened:
        assert [laid.name for laid in opened.patches] == ["one"]
        assert same(opened.generate("abc", **OPTIONS), named)
        assert opened.generate("abc", **OPTIONS, patches=[]).fingerprint == model.fingerprint
    recipe.write_text(f"gnomon: 1\nmodel: {tiny_dir}\npatches: [missing.patch.safetensors]\n")
    with pytest.raises(PatchError, match="No patch file"):
        gnomon.load(recipe, threads=1)


def test_the_module_of_a_patched_view_is_refused(model: Model) -> None:
    with pytest.raises(UsageError, match="beside its weights"), model.with_patches(["one"]).module():
        pass


def test_a_certificate_covers_the_side_path(model: Model) -> None:
    view = model.with_patches(["one"])
    certificate = view.certificate(renew=True)
    assert certificate.passed and certificate.fingerprint == view.fingerprint
    assert certificate.digest != model.certificate().digest


def test_a_patched_run_is_replayed_with_the_patch_of_that_identity(
    tiny_dir: Path, file: Path, patch: Patch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GNOMON_HOME", str(tmp_path))
    ledger = Ledger(tmp_path / "l.sqlite")
    with gnomon.load(tiny_dir, threads=1, max_sequences=2) as model:
        model.observer = ledger.add
        model.patches.add("mine", file)
        ids = [model.generate("abc", **OPTIONS, patches=["mine"]).id]
        ids.append(model.with_patches(["mine"]).generate("abc", **OPTIONS).id)
        model.generate("abc", **OPTIONS)
    for id in ids:
        run = ledger.find(id)
        assert run[0].options["patches"] == [patch.identity]
        with gnomon.load(tiny_dir, threads=1, max_sequences=2, ledger=False) as again:
            assert replay(run, again)[0].ok
            assert replay(run, again.with_patches([patch]))[0].ok
    moved = file.read_bytes()
    file.write_bytes(random_patch(open_checkpoint(tiny_dir), 5).save(tmp_path / "o.safetensors").read_bytes())
    try:
        with gnomon.load(tiny_dir, threads=1, max_sequences=2, ledger=False) as again:
            verdict = replay(ledger.find(ids[0]), again)[0]
            assert (verdict.verdict, "now it holds" in verdict.detail) == ("not replayable", True)
    finally:
        file.write_bytes(moved)
    ledger.close()


def test_networks_that_run_through_transformers_take_patches_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=267, n_positions=128, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=2
    )
    torch.manual_seed(0)
    write_tiny_model(tmp_path)  # for its tokenizer
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    g = torch.Generator().manual_seed(1)
    deltas = {
        name: LowRank(
            torch.randn(checkpoint.info(name).shape[0], 2, generator=g) * 0.2,
            torch.randn(2, checkpoint.info(name).shape[1], generator=g) * 0.2,
        )
        for name in checkpoint
        if name.endswith((".c_attn.weight", ".c_fc.weight", ".c_proj.weight", "wte.weight"))
    }
    patch = Patch(deltas, checkpoint.identity)
    with gnomon.load(tmp_path, threads=1, max_sequences=2) as model:
        view = model.with_patches([patch])
        plain, beside = model.logits("abcd"), view.logits("abcd")
        text = view.generate("abcd", max_tokens=5, seed=1)
        assert same(view.generate("abcd", max_tokens=5, seed=1), text)
        assert torch.equal(model.logits("abcd"), plain)
    with pytest.raises(UnsupportedModel, match="not supported from"):
        gnomon.load(patch.apply(open_checkpoint(tmp_path)), threads=1)  # never silently without the patch
    reference = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            key = next((key for key in deltas if name.endswith(key)), None)
            if key is not None:
                parameter += patch.dense(key)
        expected = reference(torch.tensor([model.encode("abcd")])).logits[0]
    assert torch.allclose(beside, expected, atol=1e-4)
    assert not torch.allclose(plain, expected, atol=1e-2)
