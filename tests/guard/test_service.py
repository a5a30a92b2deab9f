"""Moderation, guard sessions and the proxy over HTTP; a hundred guarded streams at once with failures among them."""

from __future__ import annotations

import asyncio
import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from gnomon.guard import Guard, Judgement, scanner
from gnomon.guard import scanning as registry
from gnomon.model import Model
from gnomon.serve.guard_proxy import create_proxy
from helpers.saying import saying
from helpers.server import serving

from .test_generating import KEY, SAID, SHOWN, leaks


@pytest.fixture(scope="module")
def said(tiny: Model) -> Iterator[Model]:
    with saying(tiny) as model:
        yield model


@pytest.fixture(scope="module")
def url(said: Model) -> Iterator[str]:
    with serving({"tiny": said}) as address:
        yield address


def test_moderations_speak_openais_shape(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    good, bad = client.moderations.create(input=["A sunny day.", "I will kill you, idiot."]).results
    assert not good.flagged and bad.flagged and bad.categories.harassment and bad.category_scores.harassment > 0.5
    assert client.moderations.create(input=f"key {KEY}").results[0].flagged
    reply = httpx.post(f"{url}/v1/moderations", json={"input": [{"type": "image_url", "image_url": {"url": "x"}}]})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "input[0]"


def test_a_session_joins_fragments_and_releases_only_what_is_safe(url: str) -> None:
    pieces, shown = [SAID[i : i + 9] for i in range(0, len(SAID), 9)], ""
    for seq, piece in enumerate(pieces):
        body = {"content": piece, "seq": seq, "done": seq == len(pieces) - 1}
        answer = httpx.post(f"{url}/guard/sessions/abc", json=body).json()
        if seq == 3:
            assert httpx.post(f"{url}/guard/sessions/abc", json=body).json() == answer
            late = httpx.post(f"{url}/guard/sessions/abc", json={"content": "x", "seq": 9})
            assert late.status_code == 400 and "Fragment 4 is missing" in late.json()["error"]["message"]
        shown += answer["text"]
        assert not leaks(shown)
    assert shown == SHOWN and answer["verdict"] == "redact" and answer["length"] == len(SAID)
    assert httpx.post(f"{url}/guard/sessions/abc", json={"content": "new"}).json()["length"] == 3
    assert httpx.request("DELETE", f"{url}/guard/sessions/abc").json()["deleted"]


def test_the_other_services_names_are_understood(url: str) -> None:
    body = {"sessionId": "s1", "content": f"my key {KEY}.", "done": True}
    answer = httpx.post(f"{url}/v1/moderate/stream", json=body).json()
    assert (
        answer["riskLevel"] == "high"
        and "github-token" in answer["labels"]
        and answer["assembledLength"] == len(f"my key {KEY}.")
    )


def test_scanning_over_http_takes_built_in_checks_only(url: str) -> None:
    body = {"text": "a bomb", "guard": {"output": [{"use": "words", "words": ["bomb"], "action": "block"}]}}
    assert httpx.post(f"{url}/guard/scan", json=body).json()["verdict"] == "block"
    body["guard"] = {"output": [{"use": "regex", "regex": "a"}]}
    assert httpx.post(f"{url}/guard/scan", json=body).status_code == 400


def test_metrics_count_findings_held_characters_and_seconds(url: str) -> None:
    body = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "a"}],
        "say": {"text": SAID},
        "guard": ["secrets"],
    }
    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    text = httpx.get(f"{url}/metrics").text
    assert 'gnomon:guard_findings_total{action="redact",rule="github-token"}' in text and KEY not in text
    assert "gnomon:guard_rollbacks_total" in text
    assert "gnomon:guard_hold_chars_bucket" in text and "gnomon:guard_added_seconds_sum" in text


@pytest.fixture(scope="module")
def proxied(url: str) -> Iterator[str]:
    import uvicorn

    from gnomon.recipe import ServeOptions
    from gnomon.serve.run import address, bind

    policy = {
        "input": [{"use": "words", "words": ["forbidden"], "action": "block"}],
        "output": ["secrets", "pii", {"use": "words", "words": ["stopnow"], "action": "block"}],
    }
    listener = bind(ServeOptions(port=0))
    server = uvicorn.Server(uvicorn.Config(create_proxy(url, Guard(policy)), log_level="error", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield address(listener)
    server.should_exit = True
    thread.join(10)
    listener.close()


def test_the_proxy_guards_another_server(proxied: str) -> None:
    client = openai.OpenAI(base_url=f"{proxied}/v1", api_key="none")
    messages: Any = [{"role": "user", "content": "abc"}]
    extra = {"say": {"text": SAID}}
    whole = client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, logprobs=True)
    assert whole.choices[0].message.content == SHOWN and whole.choices[0].logprobs is None
    text = ""
    for event in client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, stream=True, n=2):
        text += "".join(choice.delta.content or "" for choice in event.choices if choice.index == 1)
        assert not leaks(text)
    assert text == SHOWN
    extra = {"say": {"text": "fine until stopnow and more"}}
    events = list(client.chat.completions.create(model="tiny", messages=messages, extra_body=extra, stream=True))
    assert "".join(c.delta.content or "" for e in events for c in e.choices) == "fine until "
    assert [c.finish_reason for e in events for c in e.choices if c.finish_reason] == ["content_filter"]
    done = client.completions.create(model="tiny", prompt="abc", max_tokens=200, extra_body={"say": {"text": SAID}})
    assert done.choices[0].text == SHOWN
    with pytest.raises(openai.BadRequestError, match="refused by the guard"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "forbidden"}])
    assert client.models.list().data[0].id == "tiny"


def test_the_proxy_checks_tool_arguments_reasoning_and_unknown_fields() -> None:
    def upstream(request: httpx.Request) -> httpx.Response:
        deltas = [
            {"role": "assistant", "reasoning_content": "think " + KEY[:20], "surprise": KEY},
            {
                "reasoning_content": KEY[20:] + " ok",
                "tool_calls": [{"index": 0, "id": "t", "function": {"name": "f", "arguments": '{"k":"' + KEY[:9]}}],
            },
            {"tool_calls": [{"index": 0, "function": {"arguments": KEY[9:] + '"}'}}]},
        ]
        events = [
            {"choices": [{"index": 0, "delta": d, "finish_reason": None, "logprobs": {"content": [KEY]}}]}
            for d in deltas
        ]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "tool_calls"}]})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(200, content=body, headers={"content-type": "text/event-stream"})

    from fastapi.testclient import TestClient

    client = httpx.AsyncClient(transport=httpx.MockTransport(upstream))
    with TestClient(create_proxy("http://upstream", Guard(), client=client)) as proxy:
        reply = proxy.post("/v1/chat/completions", json={"model": "m", "messages": [], "stream": True})
    assert not leaks(reply.text) and reply.text.endswith("data: [DONE]\n\n")
    deltas = [json.loads(line[6:])["choices"][0] for line in reply.text.splitlines() if line.startswith("data: {")]
    reasoning = "".join(d["delta"].get("reasoning_content", "") for d in deltas)
    arguments = "".join(c["function"]["arguments"] for d in deltas for c in d["delta"].get("tool_calls", []))
    assert reasoning == "think [REDACTED:github-token] ok" and arguments == '{"k":"[REDACTED:github-token]"}'
    assert [d["finish_reason"] for d in deltas if d["finish_reason"]] == ["tool_calls"]


def test_a_hundred_streams_with_crashes_timeouts_and_disconnects_leak_nothing_and_never_mix(
    url: str, said: Model
) -> None:
    @scanner("t_moody", about="Crashes or waits when the text says so.")
    def moody(text: str, *, prompt: str = "") -> Judgement:
        if "crashes" in text:
            raise RuntimeError(KEY)
        if "hangs" in text:
            threading.Event().wait(0.4)
        return Judgement(0.0)

    said.defaults["guard"] = {"output": ["secrets", {"use": "t_moody", "action": "block", "timeout_ms": 60_000}]}
    late = {"output": ["secrets", {"use": "t_moody", "action": "block", "timeout_ms": 20}]}
    outcomes: dict[int, tuple[str, str | None]] = {}

    def one(number: int) -> None:
        kind = ("plain", "crashes", "hangs", "leaves")[number % 4]
        text = f"Stream {number:03}: the key is {KEY}. It {kind} here. Number {number:03} ends."
        body: dict[str, Any] = {
            "model": "tiny", "messages": [{"role": "user", "content": "a"}], "say": {"text": text}, "stream": True,
        }  # fmt: skip
        if kind == "hangs":
            body["guard"] = late
        shown, reason = "", None
        with (
            httpx.Client(timeout=240) as client,
            client.stream("POST", f"{url}/v1/chat/completions", json=body) as reply,
        ):
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    choice = json.loads(line[6:])["choices"][0]
                    shown += choice["delta"].get("content") or ""
                    reason = choice["finish_reason"] or reason
                    if kind == "leaves" and len(shown) > 15:
                        break
        outcomes[number] = (shown, reason)

    try:
        numbers = list(range(100))
        random.Random(0).shuffle(numbers)
        threads = [threading.Thread(target=one, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(240)
    finally:
        said.defaults.pop("guard")
        registry._known.pop("t_moody")
    assert len(outcomes) == 100
    for number, (shown, reason) in outcomes.items():
        head = f"Stream {number:03}: the key is [REDACTED:github-token]."
        assert not leaks(shown)
        assert shown.startswith((head[: len(shown)], head))
        if number % 4 == 0:
            assert shown == f"{head} It plain here. Number {number:03} ends." and reason == "stop"
        elif number % 4 in (1, 2):
            assert reason == "content_filter" and "Number" not in shown
    while said.worker.stats().running or said.worker.stats().waiting:  # those that left are cancelled shortly
        time.sleep(0.05)


def test_the_proxy_passes_on_nothing_of_a_whole_answer_that_it_does_not_know() -> None:
    """Two calls without an index are two texts; what servers add beside the text may spell it."""

    def upstream(request: httpx.Request) -> httpx.Response:
        calls = [
            {"id": f"t{n}", "type": "function", "function": {"name": "f", "arguments": f"{n} {KEY}"}} for n in "ab"
        ]
        message = {"role": "assistant", "content": None, "tool_calls": calls, "reasoning_details": [{"text": KEY}]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "debug": KEY}
        other = {"index": 1, "message": {"role": "assistant", "content": [{"type": "text", "text": KEY}]}}
        return httpx.Response(
            200, json={"id": "i", "object": "chat.completion", "choices": [choice, other], "raw": KEY}
        )

    from fastapi.testclient import TestClient

    client = httpx.AsyncClient(transport=httpx.MockTransport(upstream))
    with TestClient(create_proxy("http://upstream", Guard(), client=client)) as proxy:
        reply = proxy.post("/v1/chat/completions", json={"model": "m", "messages": []})
    assert not leaks(reply.text) and set(reply.json()) == {"id", "object", "choices"}
    message = reply.json()["choices"][0]["message"]
    assert message["content"] is None and [call["id"] for call in message["tool_calls"]] == ["ta", "tb"]
    arguments = [call["function"]["arguments"] for call in message["tool_calls"]]
    assert arguments == ["a [REDACTED:github-token]", "b [REDACTED:github-token]"]


def test_a_scanner_that_hangs_holds_up_no_other_stream_of_the_proxy() -> None:
    """More streams hang than a server has threads of its own."""

    def upstream(request: httpx.Request) -> httpx.Response:
        text = json.loads(request.content)["messages"][0]["content"]
        event = {"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": "stop"}]}
        return httpx.Response(
            200, content=f"data:{json.dumps(event)}\n\ndata: [DONE]\n\n", headers={"content-type": "text/event-stream"}
        )

    hung, release = threading.Semaphore(0), threading.Event()

    @scanner("t_hung", about="Hangs.")
    def hang(text: str, *, prompt: str = "") -> Judgement:
        if "hang" in text:
            hung.release()
            release.wait(60)
        return Judgement(0.0)

    try:
        check = {"use": "t_hung", "action": "block", "timeout_ms": 60_000}
        client = httpx.AsyncClient(transport=httpx.MockTransport(upstream))
        app = create_proxy("http://upstream", Guard({"output": [check]}), client=client)
        said: dict[int, str] = {}

        async def many() -> None:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://proxy") as user:

                async def ask(number: int, text: str) -> None:
                    body = {"model": "m", "messages": [{"role": "user", "content": text}], "stream": True}
                    said[number] = (await user.post("/v1/chat/completions", json=body)).text

                hanging = [asyncio.create_task(ask(number, "They hang. ")) for number in range(24)]
                for _ in hanging:
                    await asyncio.to_thread(hung.acquire, timeout=30)
                await ask(99, "All is well. ")
                assert "All is well." in said[99] and len(said) == 1
                release.set()
                await asyncio.gather(*hanging)

        asyncio.run(many())
        assert all("They hang." in said[number] for number in range(24))
    finally:
        release.set()
        del registry._known["t_hung"]


def test_the_proxys_vault_hides_from_the_upstream_and_restores_in_its_stream() -> None:
    """Character by character, with a placeholder that a later message forged left as it is."""
    sent: list[str] = []

    def upstream(request: httpx.Request) -> httpx.Response:
        sent.append(request.content.decode())
        events = [
            {"choices": [{"index": 0, "delta": {"content": letter}, "finish_reason": None}]}
            for letter in "For [EMAIL_1], not [TEXT_1] or [EMAIL_9]."
        ]
        events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        events.append({"choices": [], "usage": {"total_tokens": 9}})
        body = "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"
        return httpx.Response(200, content=body, headers={"content-type": "text/event-stream"})

    from fastapi.testclient import TestClient

    client = httpx.AsyncClient(transport=httpx.MockTransport(upstream))
    guard = Guard({"input": [{"use": "pii", "action": "vault"}]})
    messages = [{"role": "user", "content": "I am jane@example.org."}, {"role": "user", "content": "Say [EMAIL_1]"}]
    with TestClient(create_proxy("http://upstream", guard, client=client)) as proxy:
        reply = proxy.post("/v1/chat/completions", json={"model": "m", "messages": messages, "stream": True})
    assert "jane" not in sent[0] and "[TEXT_1]" in sent[0]
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    text = "".join(c["delta"].get("content", "") for event in events for c in event["choices"])
    assert text == "For jane@example.org, not [EMAIL_1] or [EMAIL_9]." and events[-1]["usage"] == {"total_tokens": 9}
