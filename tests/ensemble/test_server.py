"""An ensemble behind the server: with a grammar, a guard and a patched member at once, and with a member that dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from gnomon.ensemble import Ensemble
from gnomon.model import Model
from helpers.patches import random_patch
from helpers.server import serving

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "visits": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["city", "visits"],
    "additionalProperties": False,
}
REQUEST: dict[str, Any] = {
    "messages": [{"role": "user", "content": "The capital of France, and how often did you go there?"}],
    "response_format": {"type": "json_schema", "json_schema": {"name": "trip", "schema": SCHEMA, "strict": True}},
    "guard": {"output": [{"use": "words", "words": ["Paris", "Rome"], "match": "str", "replacement": "####"}]},
    "logprobs": True,
    "seed": 3,
    "max_tokens": 60,
}


def asked(url: str, **more: Any) -> dict[str, Any]:
    reply = httpx.post(f"{url}/v1/chat/completions", json=REQUEST | more, timeout=600)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


def events(url: str, **more: Any) -> list[dict[str, Any]]:
    content = REQUEST | {"stream": True, "stream_options": {"include_usage": True}} | more
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=content, timeout=600) as reply:
        return [json.loads(line[6:]) for line in reply.iter_lines() if line.startswith("data: {")]


def said(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks if c.get("choices"))


@pytest.mark.model
@pytest.mark.parametrize("core", ["union", "byte"])
def test_real_members_with_a_grammar_a_guard_and_a_patch_on_one(core: str, smollm2: Model, gemma: Model) -> None:
    patched = smollm2.with_patches([random_patch(smollm2.checkpoint, 1, size=0.05)])
    plain = Ensemble([smollm2, gemma], core=core, ledger=False)
    changed = Ensemble([patched, gemma], core=core, ledger=False)
    with plain, changed, serving({"plain": plain, "changed": changed}) as url:
        replies = {name: asked(url, model=name) for name in ("plain", "changed")}
        votes = {}
        for name, reply in replies.items():
            text = reply["choices"][0]["message"]["content"]
            value = json.loads(text)
            assert value["city"] == "####" and 0 <= value["visits"] <= 9 and "Paris" not in json.dumps(reply["choices"])
            used = reply["usage"]["ensemble"]
            assert used["fused_steps"] == used["steps"] > 0 and all(used["forwards"].values())
            votes[name] = reply["choices"][0]["logprobs"]["content"][0]["ensemble"]["votes"]
        (mine, other), (mine_patched, other_again) = votes["plain"].values(), votes["changed"].values()
        assert other == other_again and mine != mine_patched  # the patch is one member's alone
        assert said(events(url, model="changed")) == replies["changed"]["choices"][0]["message"]["content"]


@pytest.fixture
def dying(duo_dirs: list[Path], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """The address of an ensemble whose second member dies at its fourth pass."""
    with Ensemble(duo_dirs, threads=1, on_failure=request.param, ledger=False) as model:
        member, calls = model.members[1], iter(range(1000))
        advance = member.advance

        def dies(jobs: Any, budget: int) -> Any:
            if next(calls) >= 3:
                raise OSError("the wire was cut")
            return advance(jobs, budget)

        monkeypatch.setattr(member, "advance", dies)
        with serving({"m": model}) as url:
            yield url


@pytest.mark.parametrize("dying", ["continue"], indirect=True)
def test_a_member_that_dies_in_a_stream_is_named_in_its_usage(dying: str) -> None:
    chunks = events(dying, model="m", response_format={"type": "text"}, guard=None, ignore_eos=True, max_tokens=9)
    used = chunks[-1]["usage"]
    assert "the wire was cut" in used["ensemble"]["dropped"]["tiny-gemma"] and used["completion_tokens"] == 9
    assert used["ensemble"]["fused_steps"] == 3 and used["ensemble"]["steps"] == 9


@pytest.mark.parametrize("dying", ["fail"], indirect=True)
def test_a_member_that_dies_in_a_stream_ends_it_with_an_error_that_names_it(dying: str) -> None:
    chunks = events(dying, model="m", response_format={"type": "text"}, guard=None, ignore_eos=True, max_tokens=9)
    assert "tiny-gemma" in chunks[-1]["error"]["message"] and "the wire was cut" in chunks[-1]["error"]["message"]
    assert any(chunk.get("choices") for chunk in chunks[:-1])
