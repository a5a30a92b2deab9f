"""An ensemble behaves as one model, and as its members say it must."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

import gnomon
from gnomon.ensemble import Ensemble
from gnomon.ensemble.byte_runner import ByteRunner
from gnomon.ensemble.retokenize import GrowingText, Retokenizer
from gnomon.ensemble.union import UnionCore
from gnomon.errors import ConfigError, EngineFailure, GnomonError, NotAllowedInRequest, UsageError
from gnomon.generation import Generation
from gnomon.model import Model
from helpers.server import serving
from helpers.tiny import write_tiny_model

PROMPTS = ["abc", "the band in the sand", "été 中文 🙂", "x" * 90]
KINDS: dict[str, dict[str, Any]] = {
    "union": {},
    "topk": {"core": "topk"},
    "byte": {"core": "byte"},
    "beam": {"core": "byte", "mode": "beam"},
    "geometric": {"fuse": "geometric"},
    "contrastive": {"fuse": "contrastive"},
    "gate": {"when": "gate", "threshold": 0.02},
    "entropy": {"when": "entropy", "threshold": 4.0},
    "safe": {"when": "safe"},
}


def run(model: Model, prompt: str, **options: Any) -> Generation:
    result = model.generate(prompt, **{"max_tokens": 12, "temperature": 0.9, "seed": 7, "logprobs": 1} | options)
    assert isinstance(result, Generation)
    return result


def same(a: Generation, b: Generation) -> bool:
    return (a.text, a.token_ids, a.logprobs) == (b.text, b.token_ids, b.logprobs)


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, duo_dirs: list[Path]) -> Iterator[tuple[Model, dict[str, Any]]]:
    with Ensemble(duo_dirs, threads=1, max_sequences=8, **KINDS[request.param]) as model:
        yield model, KINDS[request.param]


def test_the_same_alone_in_a_batch_and_in_chunks(kind: tuple[Model, dict[str, Any]], duo_dirs: list[Path]) -> None:
    model, options = kind
    alone = [run(model, prompt) for prompt in PROMPTS]
    handles = [model.submit(p, {"max_tokens": 12, "temperature": 0.9, "seed": 7, "logprobs": 1}) for p in PROMPTS]
    together = [handle.collect()[0] for handle in handles]
    assert all(map(same, alone, together))
    with Ensemble(duo_dirs, threads=1, max_sequences=2, token_budget=5, **options) as small:
        assert all(same(a, run(small, prompt)) for a, prompt in zip(alone, PROMPTS, strict=True))


def test_members_that_must_share_few_pages_give_the_same(duo: Model, duo_dirs: list[Path]) -> None:
    networks = duo.models  # type: ignore[attr-defined]
    pages = 10 * max(model.network.page_bytes for model in networks)
    wanted = {"max_tokens": 30, "temperature": 0.9, "seed": 7, "logprobs": 1, "ignore_eos": True}
    expected = [duo.submit(prompt, wanted).collect()[0] for prompt in PROMPTS]
    with Ensemble(duo_dirs, threads=1, max_sequences=8, kv_memory=2 * pages) as poor:
        handles = [poor.submit(prompt, wanted) for prompt in PROMPTS * 3]
        assert all(same(e, h.collect()[0]) for e, h in zip(expected * 3, handles, strict=True))


def test_cached_logits_equal_a_full_pass_bit_for_bit(duo: Model) -> None:
    generation = run(duo, "the band", max_tokens=20, temperature=1.2, ignore_eos=True, ensemble={"trace": True})
    members = duo.members  # type: ignore[attr-defined]
    told = [token.trace["ensemble"]["votes"] for token in generation.logprobs or ()]  # type: ignore[index]
    symbols = duo.tokenizer.symbols  # type: ignore[attr-defined]
    for place, symbol in enumerate(generation.token_ids):
        data = symbols.text(generation.token_ids[:place])
        for m, member in enumerate(members):
            ids = member.tokenizer.encode("the band") + member.retokenizer.ids(data)
            logits = duo.models[m].logits(ids)[-1]  # type: ignore[attr-defined]
            voice = duo.worker._engine.runner.core.voice(m, logits)  # type: ignore[attr-defined]
            assert voice.at([symbol])[0] == told[place][member.name]
            assert float(voice.row()[symbol]) == told[place][member.name]


def test_one_member_is_that_model_bit_for_bit(tiny: Model, tiny_dir: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), Ensemble([tiny_dir], threads=1) as one:
        assert same(run(one, "abc"), run(tiny, "abc"))
        chat = {"max_tokens": 8, "temperature": 0.7, "seed": 2}
        assert one.chat("hello", **chat).token_ids == tiny.chat("hello", **chat).token_ids  # type: ignore[union-attr]
    assert "bit for bit" in caplog.text


@pytest.mark.parametrize("core", [None, "union"])
def test_identical_members_equal_the_model_up_to_rounding(
    core: str | None, tiny: Model, tiny_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING), Ensemble([tiny_dir, tiny_dir], threads=1, core=core) as twice:
        a, b = run(twice, "abc", temperature=0), run(tiny, "abc", temperature=0)
        assert twice.member_names == ["tiny-llama", "tiny-llama#2"]
        if core is None:
            assert a.token_ids == b.token_ids
            for x, y in zip(a.logprobs or (), b.logprobs or (), strict=True):
                assert x.logprob == pytest.approx(y.logprob, abs=1e-4)
        else:
            assert a.logprobs is not None and b.logprobs is not None
            bias = b.logprobs[0].logprob - a.logprobs[0].logprob  # type: ignore[operator]
            assert (
                a.logprobs[0].bytes == b.logprobs[0].bytes and -0.2 < bias <= 1e-4
            )  # control tokens' mass is given away
    assert "the same model" in caplog.text


def test_a_step_equals_one_computed_by_hand(duo: Model) -> None:
    members = duo.members  # type: ignore[attr-defined]
    generation = run(duo, "the band", max_tokens=1, temperature=0, logprobs=20)
    by_bytes: dict[bytes, float] = {}
    for model, member in zip(duo.models, members, strict=True):  # type: ignore[attr-defined]
        p = torch.softmax(model.logits("the band")[-1].double(), -1)
        told = {i: t for i, t in enumerate(member.retokenizer.texts) if t} | dict.fromkeys(member.stops, b"<|stop|>")
        total = sum(float(p[i]) for i in told)
        for i, text in told.items():
            by_bytes[text] = by_bytes.get(text, 0.0) + 0.5 * float(p[i]) / total
    assert sum(by_bytes.values()) == pytest.approx(1, abs=1e-9)
    assert generation.logprobs is not None
    for token in generation.logprobs[0].top:
        assert 2.718281828459045**token.logprob == pytest.approx(by_bytes[token.bytes], rel=1e-4)  # type: ignore[operator]


def test_a_voice_says_the_same_in_all_its_forms(duo: Model) -> None:
    core = duo.worker._engine.runner.core  # type: ignore[attr-defined]
    for place, model in enumerate(duo.models):  # type: ignore[attr-defined]
        logits = model.logits("the band")[-1]
        voice = core.voice(place, logits)
        room = [torch.empty(size).numpy() for size in (core.symbols.size + 99, core.symbols.size)]
        assert torch.allclose(torch.from_numpy(voice.shares(*room)), voice.row().exp(), atol=1e-7)
        assert float(voice.row().exp().sum()) == pytest.approx(1, abs=1e-5)
        assert voice.at(list(range(core.symbols.size))) == voice.row().tolist()
        logprobs = torch.log_softmax(logits.double(), -1)
        assert voice.entropy == pytest.approx(float(-(logprobs.exp() * logprobs).sum()), rel=0.05)


def test_bytes_above_0x7f_are_one_symbol_across_both_kinds_of_vocabulary(duo: Model) -> None:
    symbols = duo.tokenizer.symbols  # type: ignore[attr-defined]
    maps = duo.worker._engine.runner.core.maps  # type: ignore[attr-defined]
    for byte in range(0x80, 0x100):
        symbol = symbols.index[bytes([byte])]
        assert all(int(m.token_S[symbol]) < len(m.token_S) for m in maps)
    assert duo.tokenizer.decode(duo.encode("été 中文 🙂")) == "été 中文 🙂"


def test_a_gate_that_is_always_shut_is_the_primary_and_one_always_open_is_every(
    duo: Model, duo_dirs: list[Path]
) -> None:
    shut = run(duo, "abc", ensemble={"when": "gate", "threshold": 0.0, "primary": 1})
    used = shut.usage.details["ensemble"]
    assert used["fused_steps"] == 0 and used["forwards"]["tiny-llama"] == 0 and used["forwards"]["tiny-gemma"] == 12
    opened = run(duo, "abc", ensemble={"when": "gate", "threshold": 1.0})
    assert same(opened, run(duo, "abc"))
    assert opened.usage.details["ensemble"]["fused_steps"] == 12


def test_weights_of_a_request_count_and_a_silenced_member_is_not_run(duo: Model) -> None:
    alone = run(duo, "abc", ensemble={"weights": [1, 0]})
    assert alone.usage.details["ensemble"]["forwards"]["tiny-gemma"] == 0
    assert not same(alone, run(duo, "abc", ensemble={"weights": [0, 1]}))


def test_a_conversation_goes_through_each_members_own_template(tmp_path: Path, duo_dirs: list[Path]) -> None:
    from gnomon.ensemble.options import MemberOptions

    template = tmp_path / "other.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}>")
    members = [str(duo_dirs[0]), MemberOptions(model=str(duo_dirs[1]), chat_template=str(template))]
    with Ensemble(members, threads=1) as both:
        ids = both.render([{"role": "user", "content": "hi <|im_end|> there"}])
        from gnomon.ensemble.prompts import understand

        prompt, length = understand(both.tokenizer.symbols, ids, None)  # type: ignore[attr-defined]
        assert length == len(ids)
        first, second = (member.prompt_ids(prompt) for member in both.members)
        assert both.models[0].tokenizer.decode(second, skip_special_tokens=False)
        assert both.models[1].tokenizer.decode(second) == "[hi <|im_end|> there]>"
        assert first == both.models[0].render([{"role": "user", "content": "hi <|im_end|> there"}])
        assert run(both, "abc").usage.details["ensemble"]["steps"] == 12
        answer = both.chat("hello", max_tokens=4, seed=1)
        assert answer.usage.completion_tokens <= 4  # type: ignore[union-attr]


def test_growing_text_is_tokenised_as_the_whole_is(duo_dirs: list[Path]) -> None:
    text = ("the band and the sand in été 🙂  the  end. " * 30).encode() + b"\xf0\x9f"
    for folder in duo_dirs:
        retokenizer = Retokenizer(gnomon.models.reference.open_checkpoint(str(folder)).tokenizer())  # type: ignore[attr-defined]
        growing = GrowingText(retokenizer)
        for end in (*range(1, 60), *range(60, len(text), 37), len(text), 200):
            assert growing.update(text[:end]) == retokenizer.ids(text[:end])
            assert b"".join(retokenizer.texts[i] for i in growing.ids) == text[:end]


def test_next_bytes_sum_to_one_and_mix_the_members(duo_dirs: list[Path]) -> None:
    with (
        Ensemble(duo_dirs, threads=1, core="byte", prune=0, beam=1000) as both,
        Ensemble(duo_dirs[:1], threads=1, core="byte", prune=0, beam=1000) as first,
        Ensemble(duo_dirs[1:], threads=1, core="byte", prune=0, beam=1000) as second,
    ):
        for prefix in (b"", b"the b", "été".encode()[:3]):
            mixed = both.next_bytes(prefix)
            assert len(mixed) == 257 and sum(mixed) == pytest.approx(1, abs=1e-6)
            parts = zip(first.next_bytes(prefix), second.next_bytes(prefix), strict=True)
            assert mixed == pytest.approx([(a + b) / 2 for a, b in parts], abs=1e-6)
        text = "the band"
        bits = both.bits_per_byte(text)
        assert bits <= (first.bits_per_byte(text) + second.bits_per_byte(text)) / 2 + 1e-9
        byte_by_byte = both.byte_probabilities(text)
        assert byte_by_byte["tiny-llama"] == pytest.approx(first.byte_probabilities(text)["tiny-llama"], rel=1e-9)


def test_a_member_that_dies_ends_the_request_or_is_left_out(
    duo_dirs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for policy in ("fail", "continue"):
        with Ensemble(duo_dirs, threads=1, on_failure=policy) as model:
            member, calls = model.members[1], iter(range(100))
            advance = member.advance

            def dying(jobs: Any, budget: int, advance: Any = advance, calls: Any = calls) -> Any:
                if next(calls) >= 3:
                    raise OSError("the wire was cut")
                return advance(jobs, budget)

            monkeypatch.setattr(member, "advance", dying)
            if policy == "fail":
                with pytest.raises(EngineFailure, match=r"tiny-gemma.*wire was cut"):
                    run(model, "abc")
            else:
                used = run(model, "abc").usage.details["ensemble"]
                assert "wire was cut" in used["dropped"]["tiny-gemma"] and used["fused_steps"] == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"weights": [1.0]}, "1 weights for 2 members"),
        ({"weights": [1.0, -1.0]}, "weights are 0 or above"),
        ({"weights": [0.0, 0.0]}, "All weights are 0"),
        ({"weights": [1.0, float("nan")]}, "weights are 0 or above"),
        ({"when": "gate"}, "needs a threshold"),
        ({"when": "gate", "threshold": 1.5}, "out of range"),
        ({"threshold": 0.5}, "needs `when: gate`"),
        ({"primary": "nobody"}, "No member is called"),
        ({"primary": 5}, "no member number 5"),
        ({"fuse": "proxy"}, "needs 3 members"),
        ({"core": "bytes"}, "ensemble.core"),
        ({"core": "byte", "when": "gate", "threshold": 0.5}, "every member for every byte"),
        ({"colour": 1}, "Unknown key `ensemble.colour`"),
    ],
)
def test_what_cannot_be_is_refused_with_its_reason(options: dict[str, Any], said: str, duo_dirs: list[Path]) -> None:
    with pytest.raises(UsageError, match=said):
        Ensemble(duo_dirs, threads=1, **options)


def test_no_members_two_primaries_and_a_member_that_cannot_be_one(duo: Model, duo_dirs: list[Path]) -> None:
    from gnomon.ensemble.options import MemberOptions

    with pytest.raises(UsageError, match="list of members"):
        Ensemble([])
    with pytest.raises(UsageError, match="two primaries"):
        Ensemble([MemberOptions(model=str(path), primary=True) for path in duo_dirs], when="gate", threshold=0.5)
    with pytest.raises(GnomonError, match="cannot be a member"):
        Ensemble([duo, duo_dirs[0]])


def test_a_member_without_an_end_token_is_refused(tmp_path: Path, duo_dirs: list[Path]) -> None:
    endless = write_tiny_model(tmp_path / "endless", seed=4)
    config = json.loads((endless / "config.json").read_text())
    (endless / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (endless / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>"}))
    with pytest.raises(GnomonError, match="share no stop symbol"):
        Ensemble([endless, duo_dirs[1]], threads=1)


def test_members_without_a_common_alphabet_have_no_common_language(tmp_path: Path, duo_dirs: list[Path]) -> None:
    words = {word: place for place, word in enumerate(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "cat", "mat"])}
    whole = Tokenizer(WordLevel(words, unk_token="cat"))
    wordy = write_tiny_model(tmp_path / "wordy", seed=4, tokenizer=whole)
    for core in ("union", "byte"):
        with pytest.raises(GnomonError, match=r"no language in common.*has no tokens for single bytes"):
            Ensemble([wordy, duo_dirs[1]], threads=1, core=core)


def test_a_byte_that_one_member_cannot_say_is_said_by_nobody(duo_dirs: list[Path]) -> None:
    with Ensemble(duo_dirs, threads=1) as whole:
        first, second = whole.members
        del second.retokenizer.byte_tokens[ord("z")]
        symbols = UnionCore.vocabulary([first, second])
        assert not any(b"z" in text for text in symbols.strings) and b"a" in symbols.index
        with pytest.raises(GnomonError, match="can say the byte 0x7a"):
            symbols.of_byte(ord("z"))
        runner = ByteRunner([first, second], whole.policy, whole.options)
        chances = runner.next_bytes(b"the band")
        assert chances[ord("z")] == 0 and sum(chances) == pytest.approx(1, abs=1e-5)


def test_what_a_sweep_says_of_a_gate_is_what_the_gate_does(duo: Model, duo_dirs: list[Path]) -> None:
    (seen,) = duo.judge("the band", [" in the sand"])  # type: ignore[attr-defined]
    threshold = sorted(j.best for j in seen)[len(seen) // 2]
    with Ensemble(duo_dirs, threads=1, when="gate", threshold=threshold) as gate:
        expected = sum(j.fused if j.best < threshold else j.alone for j in seen)
        assert gate.score("the band", " in the sand").logprob == pytest.approx(expected, abs=1e-4)
        assert 0 < sum(j.best < threshold for j in seen) < len(seen)


def test_a_prompt_too_long_for_one_member_names_it(duo: Model) -> None:
    with pytest.raises(UsageError, match="600 tokens for the member `tiny-gemma`"):
        duo.generate("ou" * 300, max_tokens=1)


def test_a_request_may_set_weights_and_trace_but_name_no_model(duo: Model) -> None:
    with serving({"duo": duo}) as url:
        body = {"model": "duo", "prompt": "abc", "max_tokens": 4, "seed": 1, "logprobs": 1}
        told = httpx.post(f"{url}/v1/completions", json=body | {"ensemble": {"trace": True}}, timeout=30).json()
        assert told["usage"]["ensemble"]["forwards"] == {"tiny-llama": 4, "tiny-gemma": 4}
        chat = {"model": "duo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "logprobs": True}
        told = httpx.post(f"{url}/v1/chat/completions", json=chat | {"ensemble": {"trace": True}}, timeout=30).json()
        votes = told["choices"][0]["logprobs"]["content"][0]["ensemble"]["votes"]
        assert set(votes) == {"tiny-llama", "tiny-gemma"}
        refused = httpx.post(f"{url}/v1/completions", json=body | {"ensemble": {"members": ["x"]}}, timeout=30)
        assert refused.status_code == 400 and "ensemble.members" in refused.text
    with pytest.raises(NotAllowedInRequest):
        from gnomon.capability import Origin

        duo.submit("abc", {"ensemble": {"core": "byte"}}, origin=Origin.REQUEST)


def test_a_single_model_refuses_the_option(tiny: Model) -> None:
    with pytest.raises(UsageError, match="single model"):
        tiny.generate("abc", ensemble={"trace": True})


@pytest.mark.parametrize("option", [{"kernel": "torch"}, {"determinism": "verified"}, {"speculation": "draft"}])
def test_what_loading_an_ensemble_does_not_take_is_refused_by_name(
    option: dict[str, Any], duo_dirs: list[Path], tmp_path: Path
) -> None:
    recipe = tmp_path / "e.yaml"
    recipe.write_text(f"gnomon: 1\nensemble: {{members: ['{duo_dirs[0]}', '{duo_dirs[1]}']}}\n")
    with pytest.raises(UsageError, match=next(iter(option))):
        gnomon.load(recipe, **option)


def test_a_recipes_profile_and_limits_hold_for_its_ensemble(duo_dirs: list[Path], tmp_path: Path) -> None:
    recipe = tmp_path / "e.yaml"
    members = f"ensemble: {{members: ['{duo_dirs[0]}', '{duo_dirs[1]}']}}"
    recipe.write_text(f"gnomon: 1\nprofile: bf16\nthreads: 1\nengine: {{max_sequences: 2}}\n{members}\n")
    with gnomon.load(recipe) as both:
        assert all(model.profile.dtype == "bf16" for model in both.models)  # type: ignore[attr-defined]


def test_recipes_gac_files_and_shorthand_open_ensembles(duo_dirs: list[Path], tmp_path: Path, duo: Model) -> None:
    expected = run(duo, "abc")
    recipe = tmp_path / "two.yaml"
    recipe.write_text(yaml.safe_dump({"gnomon": 1, "ensemble": {"members": [str(path) for path in duo_dirs]}}))
    with gnomon.load(recipe, threads=1) as model:
        assert same(run(model, "abc"), expected)
    with gnomon.load("+".join(map(str, duo_dirs)), threads=1) as model:
        assert same(run(model, "abc"), expected)
        assert model.checkpoint.reference.startswith("ensemble:")
        with gnomon.load(model.checkpoint.reference, threads=1) as again:
            assert same(run(again, "abc"), expected) and again.fingerprint == model.fingerprint
    gac = {
        "NORM_TYPE_API_SERVER": "score",
        "THRESHOLD_API_SERVER": 1.0,
        "CONFIG_API_SERVER": [
            {"weight": str(path), "name": f"m{i}", "max_memory": {0: "24GiB"}, "num_gpus": 0.5, "score": s,
             "priority": "supportive", "quantization": "none"}
            for i, (path, s) in enumerate(zip(duo_dirs, (100, 50), strict=True))
        ],
    }  # fmt: skip
    recipe.write_text(yaml.safe_dump(gac))
    with gnomon.load(recipe, threads=1) as model:
        assert model.member_names == ["m0", "m1"] and model.policy.weights == pytest.approx((2 / 3, 1 / 3))  # type: ignore[attr-defined]
    gac["CONFIG_API_SERVER"][0]["quantization"] = "4bit"  # type: ignore[index]
    recipe.write_text(yaml.safe_dump(gac))
    with pytest.raises(ConfigError, match="4bit"):
        gnomon.load(recipe)


def test_score_and_prompt_logprobs_work_as_with_one_model(duo: Model) -> None:
    scored = duo.score("the band", " and the sand")
    assert scored.logprob < 0 and b"".join(token.bytes for token in scored.tokens) == b" and the sand"
    echoed = run(duo, "abc", max_tokens=1, echo=True)
    assert echoed.text.startswith("abc") and len(echoed.prompt_logprobs or ()) == len(duo.encode("abc"))
