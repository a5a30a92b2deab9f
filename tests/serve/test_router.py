"""One address before several servers: nothing accepted is lost when one dies, and nobody sees a difference."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gnomon.loading import load
from gnomon.model import Model
from gnomon.recipe import ServeOptions
from gnomon.serve import router as router_module
from gnomon.serve.app import create_app
from gnomon.serve.router import create_router
from gnomon.serve.run import address, bind
from helpers.tiny import write_tiny_model

KEY = "between-us"


class Mortal:
    """A server that breaks off in the middle of an answer: at message `last_words` of every answer, once `dying`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.dying = False
        self.last_words = 3
        self.answers = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        said = 0

        async def watched(message: Message) -> None:
            nonlocal said
            said += 1
            if self.dying and said >= self.last_words:
                raise RuntimeError("killed")
            await send(message)

        if scope["type"] == "http":
            self.answers += 1
        await self.app(scope, receive, watched if scope["type"] == "http" else send)


class Still:
    """A fleet that only loses."""

    key = KEY

    def __init__(self, alive: dict[int, str]) -> None:
        self.alive = alive
        self.lost: list[int] = []

    def addresses(self) -> dict[int, str]:
        return dict(self.alive)

    def failed(self, number: int, address: str) -> None:
        self.lost.append(number)
        self.alive.pop(number, None)


@contextmanager
def running(app: ASGIApp) -> Iterator[str]:
    listener = bind(ServeOptions(port=0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield address(listener)
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


def replica(model: Model) -> Mortal:
    app = create_app({"tiny": model}, ServeOptions(api_key=KEY))
    app.state.gnomon.close = lambda: None
    return Mortal(app)


@contextmanager
def three(models: list[Model]) -> Iterator[tuple[str, Still, list[Mortal], Any]]:
    """(the router's address, its fleet, the replicas, its counts)."""
    with ExitStack() as stack:
        replicas = [replica(model) for model in models]
        fleet = Still({i: stack.enter_context(running(app)) for i, app in enumerate(replicas)})
        app = create_router(fleet)
        yield stack.enter_context(running(app)), fleet, replicas, app.state.router.counts


def body(place: int, **more: Any) -> dict[str, Any]:
    return {"model": "tiny", "prompt": f"the {place}", "max_tokens": 12, "seed": place, "temperature": 1.0} | more


def answer(url: str, content: dict[str, Any]) -> Any:
    reply = httpx.post(f"{url}/v1/completions", json=content, timeout=60)
    assert reply.status_code == 200, reply.text
    return [(choice["text"], choice["finish_reason"]) for choice in reply.json()["choices"]]


def events(url: str, content: dict[str, Any], key: str | None = None) -> list[dict[str, Any]]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    found = []
    with httpx.stream(
        "POST", f"{url}/v1/completions", json=content | {"stream": True}, headers=headers, timeout=60
    ) as reply:
        for line in reply.iter_lines():
            if line.startswith("data: {"):
                found.append(json.loads(line[6:]))
    return found


def said(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in event.items() if name not in ("id", "created")} for event in found]


def test_a_replica_that_dies_under_load_loses_no_request(tiny: Model) -> None:
    with three([tiny] * 3) as (url, fleet, replicas, counts), ThreadPoolExecutor(8) as pool:
        expected = {place: answer(url, body(place)) for place in range(12)}
        assert all(one.answers for one in replicas), "every replica has had something to do"
        replicas[1].dying, replicas[1].last_words = True, 2
        found = list(pool.map(lambda place: answer(url, body(place % 12)), range(48)))
        assert fleet.lost and set(fleet.lost) == {1} and counts.retries > 0
        assert counts.requests == 12 + 48
    assert all(result == expected[place % 12] for place, result in enumerate(found))


def test_a_stream_that_is_cut_goes_on_elsewhere_as_if_nothing_had_been(tiny: Model) -> None:
    with three([tiny] * 3) as (url, fleet, replicas, counts):
        whole = {place: events(url, body(place)) for place in range(6)}
        for one in replicas[:2]:
            one.dying, one.last_words = True, 5
        found = {place: events(url, body(place)) for place in range(6)}
        assert counts.resumed >= 1 and set(fleet.lost) == {0, 1}
    for place, own in found.items():
        assert said(own) == said(whole[place])
        assert len({event["id"] for event in own}) == 1, "one answer, one name"


def test_a_replica_with_other_bits_never_finishes_anothers_stream(tiny: Model, tmp_path: Path) -> None:
    other = load(write_tiny_model(tmp_path / "other", seed=5), threads=1)
    with other, three([tiny, other]) as (url, _, replicas, _):
        for place in range(12):  # one whose own replica is the first
            before = replicas[0].answers
            answer(url, body(place))
            if replicas[0].answers > before:
                break
        replicas[0].dying, replicas[0].last_words = True, 6
        last = events(url, body(place))[-1]
    assert "went on differently" in last["error"]["message"]


def test_a_request_without_a_seed_gets_one_before_it_is_sent(tiny: Model) -> None:
    with three([tiny] * 2) as (url, _, _, _):
        content = body(1)
        del content["seed"]
        replies = [httpx.post(f"{url}/v1/completions", json=content, timeout=30).json() for _ in range(2)]
    assert all(isinstance(reply["seed"], int) for reply in replies) and replies[0]["seed"] != replies[1]["seed"]


def test_a_session_stays_with_its_replica(tiny: Model) -> None:
    with three([tiny] * 3) as (url, _, replicas, _):
        for session in ("a", "b"):
            before = [one.answers for one in replicas]
            for place in range(4):
                headers = {"X-Session-Id": session}
                httpx.post(f"{url}/v1/completions", json=body(place, max_tokens=1), headers=headers, timeout=30)
            gained = [one.answers - was for one, was in zip(replicas, before, strict=True)]
            assert sorted(gained) == [0, 0, 4], gained


def test_what_would_change_one_replica_alone_is_refused(tiny: Model) -> None:
    with three([tiny] * 2) as (url, _, _, _):
        reply = httpx.post(f"{url}/v1/replay", json={}, timeout=30)
        assert reply.status_code == 400 and "/v1/replay is not served with replicas" in reply.json()["error"]["message"]
        assert httpx.get(f"{url}/v1/models", timeout=30).json()["data"][0]["id"] == "tiny"
        assert httpx.get(f"{url}/healthz", timeout=30).json() == {"status": "ok", "replicas": [0, 1]}
        bad = httpx.post(f"{url}/v1/completions", json=body(1, model="nobody", stream=True), timeout=30)
        assert bad.status_code == 404 and "nobody" in bad.text
        assert "gnomon_router:requests_total" in httpx.get(f"{url}/metrics", timeout=30).text


def test_without_any_replica_the_answer_is_503(tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(router_module, "PATIENCE", 0.3)
    with running(create_router(Still({}))) as url:
        assert httpx.post(f"{url}/v1/completions", json=body(1), timeout=30).status_code == 503
