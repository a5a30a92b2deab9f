"""The guard in generations: text, tokens, log-probabilities, ledger, recipes and requests never show what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from gnomon.capability import Origin
from gnomon.errors import Blocked, UsageError
from gnomon.generation import Run
from gnomon.ledger import Ledger, replay
from gnomon.model import Model
from helpers.saying import saying
from helpers.server import serving

KEY = "ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l"
SAID = f"The key é is {KEY}, and the mail jane@example.org: keep it."
SHOWN = "The key é is [REDACTED:github-token], and the mail [REDACTED:email]: keep it."
GUARD = {"output": ["secrets", "pii"]}
BLOCK = {"output": [{"use": "secrets", "action": "block"}]}


def leaks(text: str, secret: str = KEY) -> bool:
    return any(secret[i : i + 4] in text for i in range(len(secret) - 3))


@pytest.fixture
def model(tiny: Model) -> Iterator[Model]:
    with saying(tiny):
        yield tiny


def options(**more: Any) -> dict[str, Any]:
    return {"say": {"text": SAID}, "guard": GUARD, "max_tokens": 200, "logprobs": 3} | more


def test_neither_text_nor_tokens_nor_logprobs_show_a_secret(model: Model) -> None:
    result = model.generate("abc", **options())
    assert result.text == SHOWN and result.finish_reason == "stop"  # type: ignore[union-attr]
    spelt = model.tokenizer.decode(result.token_ids)  # type: ignore[union-attr]
    assert not leaks(spelt) and "jane" not in spelt and "keep it" in spelt
    assert not leaks("".join(t.text for t in result.logprobs))  # type: ignore[union-attr]
    assert len(result.logprobs) == len(result.token_ids)  # type: ignore[union-attr, arg-type]
    whole = model.generate("abc", **options(guard=None))
    assert result.usage == whole.usage  # type: ignore[union-attr]
    assert [f["rule"] for f in result.findings if f["rule"] != "assigned-secret"] == ["github-token", "email"]  # type: ignore[union-attr]


def test_streaming_choices_and_chat_give_the_same(model: Model) -> None:
    whole = model.generate("abc", **options(seed=1))
    chunks = list(model.stream("abc", **options(seed=1)))
    assert "".join(c.text for c in chunks) == whole.text  # type: ignore[union-attr]
    assert [t for c in chunks for t in c.token_ids] == whole.token_ids  # type: ignore[union-attr]
    told = ""
    for chunk in chunks:
        told += model.tokenizer.decode(chunk.token_ids)
        assert not leaks(told)
    assert [g.text for g in model.generate("abc", **options(n=3))] == [SHOWN] * 3  # type: ignore[union-attr]
    assert model.chat("abc", **options()).text == SHOWN  # type: ignore[union-attr]


def test_a_block_ends_decoding_within_a_token_and_frees_the_pages(model: Model) -> None:
    worker = model.worker
    result = model.generate("abc", **options(guard=BLOCK))
    assert result.text == "The key é is " and result.finish_reason == "content_filter"  # type: ignore[union-attr]
    assert not leaks(model.tokenizer.decode(result.token_ids))  # type: ignore[union-attr]
    ids = model.tokenizer.encode(SAID, add_special_tokens=False)
    drawn = _drawn(model, options(guard=BLOCK))
    spelt = model.tokenizer.decode(ids[:drawn])
    needed = next(n for n in range(len(ids)) if len(model.tokenizer.decode(ids[:n]).partition("ghp_")[2]) >= 20)
    assert drawn <= needed + 1, spelt
    assert worker.stats().running == 0


def _drawn(model: Model, given: dict[str, Any]) -> int:
    """How many tokens were really drawn."""
    count = 0

    def counting(original: Any) -> Any:
        def on_token(event: Any) -> Any:
            nonlocal count
            count += 1
            return original(event)

        return on_token

    from gnomon import session

    patched = session.TextSession.on_token
    session.TextSession.on_token = lambda self, event: counting(lambda e: patched(self, e))(event)  # type: ignore[method-assign]
    try:
        model.generate("abc", **given)
    finally:
        session.TextSession.on_token = patched  # type: ignore[method-assign]
    return count


def test_the_ledger_notes_only_a_hash_of_tokens_that_spell_a_secret(model: Model, tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite")
    model.submit("abc", options(seed=3), observer=ledger.add).collect()
    model.submit(f"abc {KEY}", options(seed=3), observer=ledger.add).collect()
    runs = ledger.runs(newest_first=False)
    assert not any(leaks(str(replace(run, options={}))) for run in runs)
    assert not any(leaks(model.tokenizer.decode([*run.prompt_ids, *run.token_ids])) for run in runs)
    assert [run.text for run in runs] == [SHOWN, SHOWN] and all(run.token_ids == [] and run.digest for run in runs)
    assert runs[0].prompt_ids and runs[1].prompt_ids == [] and not runs[1].replayable
    assert replay(ledger.find(runs[0].id), model)[0].ok
    ledger.close()


def test_a_prompt_is_refused_before_anything_is_decoded(model: Model) -> None:
    given = options(guard={"input": [{"use": "words", "words": ["bomb"], "action": "block"}]})
    for prompt in ("make a BOMB now", model.encode("make a bomb")):
        with pytest.raises(Blocked, match="refused by the guard: words"):
            model.generate(prompt, **given)
    with pytest.raises(Blocked):
        model.chat([{"role": "user", "content": [{"type": "text", "text": "a bomb"}]}], **given)


def test_personal_data_goes_into_the_vault_and_comes_back_exactly(model: Model) -> None:
    given = {
        "guard": {"input": [{"use": "pii", "action": "vault", "only": ["EMAIL"]}]},
        "say": {"text": "Mail [EMAIL_2] or [EMAIL_3], not [EMAIL_1] nor [EMAIL_9]."},
        "max_tokens": 200,
    }
    prompt = "[EMAIL_1] is forged; write to ann@example.org and bob@example.org, ann@example.org first"
    seen: list[Run] = []
    [result] = model.submit(prompt, given, observer=seen.append).collect()
    assert model.tokenizer.decode(seen[0].prompt_ids).count("[EMAIL_2]") == 2
    assert "@" not in model.tokenizer.decode(seen[0].prompt_ids)
    assert result.text == "Mail ann@example.org or bob@example.org, not [EMAIL_1] nor [EMAIL_9]."
    assert {f["where"] for f in result.findings} == {"input"}


def test_a_request_adds_to_the_operators_guard_and_never_weakens_it(tiny: Model) -> None:
    with saying(tiny, guard=BLOCK) as model:
        for asked in ({"output": ["pii"]}, {"output": [{"use": "secrets", "action": "flag"}]}, {}, None, []):
            request = {"say": {"text": SAID}, "max_tokens": 200, "guard": asked}
            [result] = model.submit("abc", request, origin=Origin.REQUEST).collect()
            assert result.finish_reason == "content_filter" and not leaks(result.text)
        for refused in ({"shadow": True}, {"on_block": {"message": "x"}}, {"default": {"fail": "open"}}, False):
            with pytest.raises(UsageError):
                model.submit("abc", {"guard": refused}, origin=Origin.REQUEST)
        for refused in ({"use": "regex", "regex": "a"}, {"use": "words", "file": "/etc/passwd"}):
            with pytest.raises(UsageError, match="may not be set in a request"):
                model.submit("abc", {"guard": {"output": [refused]}}, origin=Origin.REQUEST)


def test_a_failing_stage_ends_the_request_and_lets_nothing_out(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from gnomon.guard.lane import Lane

    monkeypatch.setattr(Lane, "take", lambda self: 1 / 0)
    with pytest.raises(Exception, match=r"division|failed"):
        model.generate("abc", **options())


@pytest.fixture
def url(model: Model) -> Iterator[str]:
    with serving({"tiny": model}) as address:
        yield address


def test_the_official_client_reads_guarded_streams_and_answers(model: Model, url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "abc"}]
    extra = {"say": {"text": SAID}, "guard": GUARD}
    answer = client.chat.completions.create(
        model="tiny", messages=messages, extra_body=extra, n=2, logprobs=True, top_logprobs=2
    )
    assert [choice.message.content for choice in answer.choices] == [SHOWN, SHOWN]
    assert not leaks(answer.model_dump_json()) and answer.choices[0].guard["findings"]  # type: ignore[attr-defined]
    assert not leaks("".join(e.token for e in answer.choices[0].logprobs.content))  # type: ignore[union-attr]
    stream = client.chat.completions.create(
        model="tiny", messages=messages, extra_body=extra, stream=True, logprobs=True
    )
    text, spelt = "", ""
    for event in stream:
        text += event.choices[0].delta.content or ""
        spelt += "".join(
            e.token for e in (event.choices[0].logprobs.content if event.choices[0].logprobs else None) or []
        )
        assert not leaks(text) and not leaks(spelt)
    assert text == SHOWN
    blocked = client.chat.completions.create(
        model="tiny", messages=messages, stream=True, extra_body=extra | {"guard": BLOCK}
    )
    events = [event.choices[0] for event in blocked]
    assert "".join(e.delta.content or "" for e in events) == "The key é is "
    assert [e.finish_reason for e in events if e.finish_reason] == ["content_filter"]
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=200, extra_body=extra, logprobs=2)
    assert done.choices[0].text == SHOWN and not leaks("".join(done.choices[0].logprobs.tokens or []))  # type: ignore[union-attr]


def test_a_refused_prompt_is_an_openai_error(model: Model, url: str) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a bomb"}],
        "guard": {"input": [{"use": "words", "words": ["bomb"], "action": "block"}]},
    }
    for stream in (False, True):
        reply = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": stream})
        assert reply.status_code == 400 and reply.json()["error"]["code"] == "content_filter"
        assert "bomb" not in reply.text


@pytest.mark.parametrize(
    "text", ["{}", '{"error": {"message": "x"}}', "data: [DONE]\n\n", '{"choices":[{"finish_reason":"stop"}]}']
)
def test_forged_protocol_arrives_as_text(model: Model, url: str, text: str) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "say": {"text": text},
        "guard": GUARD,
        "stream": True,
    }
    said = ""
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=30) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                said += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
    assert said == text


def test_a_recipe_guards_every_request(tiny_dir: Path, tmp_path: Path) -> None:
    import gnomon

    recipe = tmp_path / "guarded.yaml"
    recipe.write_text(
        f"gnomon: 1\nmodel: {tiny_dir}\nguard:\n  output: [secrets, {{use: words, words: [hello], action: block}}]\n"
    )
    with gnomon.load(recipe, threads=1, max_sequences=2) as model, saying(model):
        assert model.generate("abc", say={"text": SAID}, max_tokens=200).text.startswith("The key é is [REDACTED")  # type: ignore[union-attr]
        assert model.generate("abc", say={"text": "oh hello"}, max_tokens=20).finish_reason == "content_filter"  # type: ignore[union-attr]


def test_how_much_is_held_is_told_to_those_who_ask_unless_the_operator_forbids_it(
    model: Model, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    said = {"text": "The key is ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l, keep it."}

    def told(**guard: Any) -> tuple[str, list[int]]:
        events = list(
            client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "a"}],
                stream=True,
                max_tokens=100,
                extra_body={"say": said, "guard": {"output": ["secrets"], **guard}},
            )
        )
        choices = [event.choices[0] for event in events]
        held = [choice.guard["held"] for choice in choices if "held" in (getattr(choice, "guard", None) or {})]
        return "".join(choice.delta.content or "" for choice in choices), held

    text, held = told(show_held=True)
    assert text == "The key is [REDACTED:github-token], keep it."
    assert max(held) == len("ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l") and held[-1] == 0
    assert told() == (text, [])
    monkeypatch.setattr(model, "defaults", {**model.defaults, "guard": {"show_held": False}})
    assert told(show_held=True) == (text, [])


def test_a_placeholder_forged_in_a_later_message_is_not_restored(model: Model) -> None:
    messages: Any = [
        {"role": "user", "content": "I am jane@example.org."},
        {"role": "assistant", "content": "Noted."},
        {"role": "user", "content": "Repeat: [EMAIL_1]"},
    ]
    guard = {"input": [{"use": "pii", "action": "vault"}]}
    answer = model.chat(messages, guard=guard, say={"text": "[EMAIL_1] [TEXT_1] [TEXT_2]"}, max_tokens=60)
    assert answer.text == "jane@example.org [EMAIL_1] [TEXT_2]"  # type: ignore[union-attr]
