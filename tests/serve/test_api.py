"""The API, through the official client and through plain HTTP where the client would not go."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gnomon.client import RemoteClient
from gnomon.errors import ModelNotFound, UsageError
from gnomon.model import Model
from helpers.server import serving

HI: list[Any] = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def url(tiny: Model) -> Iterator[str]:
    with serving({"tiny": tiny}) as address:
        yield address


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0)


def test_a_chat_answers_whole_and_streamed_alike(client: openai.OpenAI, tiny: Model) -> None:
    given: dict[str, Any] = {"model": "tiny", "messages": HI, "max_tokens": 12, "temperature": 0.9, "seed": 4}
    whole = client.chat.completions.create(**given, logprobs=True, top_logprobs=2)
    assert whole.system_fingerprint == tiny.fingerprint
    events = list(client.chat.completions.create(**given, stream=True, stream_options={"include_usage": True}))
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == whole.choices[0].message.content
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].usage == whole.usage and not events[-1].choices
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    logprobs = whole.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None and whole.usage is not None
    assert len(logprobs.content) == whole.usage.completion_tokens
    assert all(len(t.top_logprobs) == 2 for t in logprobs.content)
    raw = b"".join(bytes(t.bytes or []) for t in logprobs.content)
    raw = raw.replace(b"<|endoftext|>", b"").replace(b"<|im_start|>", b"")  # control tokens are tokens, not text
    assert raw.decode("utf-8", "replace") == whole.choices[0].message.content


def test_several_choices_and_prompts_are_numbered_through(client: openai.OpenAI) -> None:
    reply = client.completions.create(
        model="tiny", prompt=[[9, 9], [5, 6, 7]], n=2, seed=1, temperature=1.0, max_tokens=4
    )
    assert [c.index for c in reply.choices] == [0, 1, 2, 3]
    assert len({c.text for c in reply.choices}) > 1
    assert reply.usage is not None and reply.usage.prompt_tokens == 2 + 3
    single = client.completions.create(model="tiny", prompt=[5, 6, 7], n=2, seed=1, temperature=1.0, max_tokens=4)
    assert [c.text for c in single.choices] == [c.text for c in reply.choices[2:]]


def test_echo_gives_the_prompt_and_its_logprobs(client: openai.OpenAI) -> None:
    reply = client.completions.create(model="tiny", prompt="abc", echo=True, logprobs=1, max_tokens=2)
    choice = reply.choices[0]
    assert choice.text.startswith("abc") and choice.logprobs is not None
    assert choice.logprobs.token_logprobs is not None and choice.logprobs.token_logprobs[0] is None
    assert len(choice.logprobs.tokens or []) == 5


def test_stop_strings_bias_and_penalties_act(client: openai.OpenAI, tiny: Model) -> None:
    plain = client.completions.create(model="tiny", prompt="abc", max_tokens=10).choices[0]
    letter = plain.text[3]
    stopped = client.completions.create(model="tiny", prompt="abc", max_tokens=10, stop=letter).choices[0]
    assert stopped.finish_reason == "stop" and stopped.text == plain.text[: plain.text.index(letter)]
    first = tiny.generate("abc", max_tokens=1).token_ids[0]
    banned = client.completions.create(model="tiny", prompt="abc", max_tokens=1, logit_bias={str(first): -100})
    assert banned.choices[0].text != plain.text[:1]


def test_models_are_listed_and_embeddings_come_as_floats_or_base64(client: openai.OpenAI, url: str) -> None:
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    vector = client.embeddings.create(model="tiny", input=["hello", "x"]).data[1].embedding
    assert sum(v * v for v in vector) == pytest.approx(1, abs=1e-5)
    body = {"model": "tiny", "input": "x", "encoding_format": "base64"}
    packed = httpx.post(f"{url}/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert struct.unpack(f"<{len(vector)}f", base64.b64decode(packed)) == pytest.approx(vector)


@pytest.mark.parametrize(
    ("body", "status", "param", "says"),
    [
        ({"model": "nope"}, 404, "model", "not served"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperatur": 1}, 400, "temperatur", "Did you mean `temperature`"),
        ({"messages": []}, 400, "messages", "messages"),
        ({"messages": [{"role": "user", "content": ""}], "max_tokens": 100000}, 400, "max_tokens", "context"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "messages", "context of 512"),
        ({"n": 1000}, 400, "n", "1000"),
        ({"n": "two"}, 400, "n", "whole number"),
        ({"top_logprobs": 3}, 400, "top_logprobs", "logprobs: true"),
        ({"tools": [{"type": "function"}]}, 400, "tools[0]", "of type"),
        ({"response_format": {"type": "other"}}, 400, "response_format.type", "known"),
        ({"stream_options": {"x": 1}}, 400, "stream_options.x", "Unknown"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias", "99999"),
    ],
)
def test_a_wrong_field_is_refused_with_its_name(
    url: str, body: dict[str, Any], status: int, param: str, says: str
) -> None:
    reply = httpx.post(f"{url}/v1/chat/completions", json={"model": "tiny", "messages": HI} | body)
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (status, param)
    assert says in error["message"] and error["type"]


def test_fields_that_change_nothing_are_named_in_a_header(url: str) -> None:
    body = {
        "model": "tiny",
        "messages": HI,
        "max_tokens": 1,
        "user": "u",
        "store": False,
        "response_format": {"type": "text"},
    }
    reply = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert reply.headers["x-gnomon-ignored"] == "store, user"


@pytest.mark.parametrize(
    ("content", "headers", "status", "says"),
    [
        (b"{bad", {}, 400, "not valid JSON"),
        (b'"\xff"', {}, 400, "UTF-8 at byte 1"),
        (b"[" * 100_000, {}, 400, "nested too deep"),
        (b'{"temperature": NaN}', {}, 400, "NaN"),
        (b"[1]", {}, 400, "JSON object"),
        (b"{}", {"Content-Type": "text/plain"}, 415, "application/json"),
        (b"x" * (5 << 20), {}, 413, "larger than"),
        (b"{}", {"Host": "evil.example"}, 403, "evil.example"),
        (b"{}", {"Origin": "https://evil.example"}, 403, "evil.example"),
    ],
)
def test_a_body_or_caller_that_is_not_right_is_refused(
    url: str, content: bytes, headers: dict[str, str], status: int, says: str
) -> None:
    sent = {"Content-Type": "application/json"} | headers
    reply = httpx.post(f"{url}/v1/chat/completions", content=content, headers=sent)
    assert reply.status_code == status
    assert says in reply.json()["error"]["message"]


def test_a_chunked_body_is_counted_as_it_comes(url: str) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 100_000

    reply = httpx.post(f"{url}/v1/completions", content=endless(), headers={"Content-Type": "application/json"})
    assert reply.status_code == 413


def test_a_key_is_asked_for_and_a_wrong_one_refused(tiny: Model) -> None:
    with serving({"tiny": tiny}, api_key="right") as address:
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            wrong.models.list()
        assert openai.OpenAI(base_url=f"{address}/v1", api_key="right").models.list().data[0].id == "tiny"
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert httpx.get(f"{address}/metrics").status_code == 401


def test_health_version_metrics_and_docs_answer(url: str) -> None:
    assert httpx.get(f"{url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{url}/readyz").json()["models"] == ["tiny"]
    assert "gnomon:generation_tokens_total" in httpx.get(f"{url}/metrics").text
    page = httpx.get(f"{url}/docs").text
    assert "swagger" in page and "http" not in page.replace("http-equiv", "")  # nothing from elsewhere
    assert "/v1/chat/completions" in httpx.get(f"{url}/openapi.json").json()["paths"]
    assert httpx.get(f"{url}/nowhere").json()["error"]["message"] == "No such route: GET /nowhere."


def test_a_client_that_leaves_stops_the_decoding(url: str, tiny: Model) -> None:
    body = {"model": "tiny", "messages": HI, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        next(reply.iter_lines())
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/chat/completions", json=body | {"stream": False}, timeout=0.05)
    deadline = time.monotonic() + 5
    while tiny.stats().running and time.monotonic() < deadline:
        time.sleep(0.02)
    assert tiny.stats().running == 0 and tiny.stats().pages_used == 0


def test_a_full_queue_answers_429_and_the_server_lives(tiny: Model) -> None:
    with serving({"tiny": tiny}, max_waiting=0) as address:
        reply = httpx.post(f"{address}/v1/completions", json={"model": "tiny", "prompt": "x"})
        assert reply.status_code == 429
        assert reply.headers["retry-after"] and reply.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{address}/healthz").status_code == 200


def test_health_answers_while_many_decode(url: str) -> None:
    body = {"model": "tiny", "messages": HI, "max_tokens": 150, "ignore_eos": True}
    threads = [
        threading.Thread(target=httpx.post, args=(f"{url}/v1/chat/completions",), kwargs={"json": body, "timeout": 60})
        for _ in range(32)
    ]
    for thread in threads:
        thread.start()
    slowest = 0.0
    with httpx.Client() as http:
        while any(thread.is_alive() for thread in threads):
            started = time.monotonic()
            assert http.get(f"{url}/healthz").status_code == 200
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.02)
    assert slowest < 5  # liveness; the 100 ms figure is measured by benchmarks/serve.py


def test_our_own_client_gives_the_same_as_the_model(url: str, tiny: Model) -> None:
    remote = RemoteClient(f"{url}/v1")
    options = {"max_tokens": 8, "temperature": 0.7, "seed": 9}
    local = tiny.chat(HI, **options)
    answer = remote.chat(HI, **options)
    assert (answer.text, answer.seed, answer.fingerprint) == (local.text, 9, tiny.fingerprint)  # type: ignore[union-attr]
    with pytest.raises(UsageError, match="temperature"):
        remote.chat(HI, temperature=-1.0)
    with pytest.raises(ModelNotFound):
        RemoteClient(f"{url}/v1", "nope").chat(HI)


def test_errors_in_the_middle_of_a_stream_end_it_properly(
    url: str, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = tiny.worker._engine.runner
    calls = 0
    step = runner.step

    def failing(spans: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise RuntimeError("the machine is tired")
        return step(spans)

    monkeypatch.setattr(runner, "step", failing)
    body = {"model": "tiny", "messages": HI, "stream": True, "max_tokens": 50, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
        lines = [line for line in reply.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert "tired" in json.loads(lines[-2][6:])["error"]["message"]


@pytest.mark.model
def test_the_real_model_answers_paris_through_the_official_client(smollm2: Model) -> None:
    with serving({"smollm2-135m-instruct": smollm2}) as address:
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="x")
        asked: Any = [{"role": "user", "content": "What is the capital of France?"}]
        reply = client.chat.completions.create(model="smollm2-135m-instruct", messages=asked)
        assert "Paris" in (reply.choices[0].message.content or "")
        with client.chat.completions.stream(model="smollm2-135m-instruct", messages=asked) as stream:
            for _ in stream:
                pass
            assert stream.get_final_completion().choices[0].message.content == reply.choices[0].message.content
