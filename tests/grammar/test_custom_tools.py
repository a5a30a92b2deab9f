"""Custom tools: text of any kind, of a pattern or of a Lark grammar, through the official client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from openai import OpenAI

from gnomon.grammar.calls import HERMES, CallReader
from gnomon.grammar.plans import make, plan_of, restore
from gnomon.grammar.tools import tool_grammar
from gnomon.loading import load
from helpers.server import serving
from helpers.tiny import write_tiny_model

MESSAGES: list[Any] = [{"role": "user", "content": "abc"}]
LARK = 'start: "SELECT " NAME (", " NAME)?\nNAME: /[a-z]{1,3}/\n'
PATTERN = r"[0-9]{2}:[0-9]{2}"


def custom(name: str, syntax: str | None = None, definition: str = "") -> dict[str, Any]:
    wanted = {"type": "grammar", "grammar": {"syntax": syntax, "definition": definition}}
    return {"type": "custom", "custom": {"name": name, "format": wanted if syntax else {"type": "text"}}}


TOOLS: list[Any] = [
    custom("query", "lark", LARK),
    custom("time", "regex", PATTERN),
    custom("note"),
    {"type": "function", "function": {"name": "stop", "parameters": {"type": "object", "properties": {}}}},
]
FUNCTIONS: list[dict[str, Any]] = [
    {"name": "query", "custom": TOOLS[0]["custom"]["format"]},
    {"name": "time", "custom": TOOLS[1]["custom"]["format"]},
    {"name": "note", "custom": TOOLS[2]["custom"]["format"]},
    {"name": "stop", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
]
FITS = {"query": r"SELECT [a-z]{1,3}(, [a-z]{1,3})?", "time": PATTERN, "note": r"[\s\S]*"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAI]:
    folder = write_tiny_model(tmp_path_factory.mktemp("roomy") / "tiny", max_position_embeddings=4096)
    with load(folder, threads=1, max_sequences=4) as model, serving({"tiny": model}) as url:
        yield OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def call(name: str, text: str) -> str:
    return HERMES.custom_opening(name) + text + HERMES.custom_tail


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (call("query", "SELECT a, bc"), True),
        (call("query", "SELECT a,b"), False),
        (call("time", "12:30"), True),
        (call("time", "12:3"), False),
        (call("note", "any\ntext </tool_call> at all"), True),
        (call("query", "SELECT a") + "\n" + call("time", "00:00"), True),
        (HERMES.opening("query") + "{}" + HERMES.tail, False),
        (HERMES.opening("stop") + "{}" + HERMES.tail, True),
        (call("stop", "{}"), False),
    ],
)
@pytest.mark.parametrize("choice", ["required", "auto"])
def test_the_grammar_takes_each_tools_own_text_and_no_other(text: str, ok: bool, choice: Any) -> None:
    grammar = tool_grammar(FUNCTIONS, HERMES, choice=choice, parallel=True)
    assert grammar.accepts(text).ok is ok


def test_a_text_is_taken_apart_the_same_in_pieces_of_any_size() -> None:
    text = call("note", "a\nb") + "\n" + HERMES.opening("stop") + '{"x": 1}' + HERMES.tail + "\n" + call("time", "1")
    for size in (1, 2, 3, 7, len(text)):
        reader = CallReader(HERMES)
        pieces = [piece for at in range(0, len(text), size) for piece in reader.push(text[at : at + size])]
        assert [(c.name, c.arguments, c.custom) for c in reader.calls] == [
            ("note", "a\nb", True),
            ("stop", '{"x": 1}', False),
            ("time", "1", True),
        ]
        assert "".join(p.text for p in pieces if p.index == 0 and p.kind == "arguments") == "a\nb"


def test_a_plan_keeps_what_a_custom_tool_takes() -> None:
    arguments = {
        "tools": {"functions": FUNCTIONS, "form": "hermes", "choice": "required", "parallel": True, "content": None}
    }
    again = restore(arguments, plan_of(make(arguments)))
    assert again.accepts(call("time", "12:30")) and not again.accepts(call("time", "12.30"))


@pytest.mark.parametrize("name", ["query", "time", "note"])
def test_the_official_client_gets_a_custom_call_as_a_message_and_as_deltas(client: OpenAI, name: str) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "tools": TOOLS,
        "tool_choice": {"type": "custom", "custom": {"name": name}},
        "max_tokens": 90,
        "temperature": 1.0,
        "seed": 4,
    }
    answer = client.chat.completions.create(**asked)
    (made,) = answer.choices[0].message.tool_calls or []
    assert made.type == "custom" and made.custom.name == name
    assert re.fullmatch(FITS[name], made.custom.input)
    written, kinds = "", set()
    for chunk in client.chat.completions.create(**asked, stream=True):
        for delta in (chunk.choices[0].delta.tool_calls or []) if chunk.choices else []:
            extra = delta.model_dump()
            written += (extra.get("custom") or {}).get("input") or ""
            kinds.add(extra.get("type"))
    assert written == made.custom.input and "custom" in kinds


def test_a_custom_call_and_its_result_may_stand_in_the_conversation(client: OpenAI) -> None:
    made = {"id": "call_1", "type": "custom", "custom": {"name": "note", "input": "x"}}
    told: list[Any] = [
        *MESSAGES,
        {"role": "assistant", "tool_calls": [made]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    answer = client.chat.completions.create(model="tiny", messages=told, tools=TOOLS, max_tokens=90)
    assert answer.choices[0].finish_reason in ("stop", "length", "tool_calls")


@pytest.mark.parametrize(
    "wrong",
    [custom("x", "lark", "start: missing"), custom("x", "regex", "("), custom("x", "ebnf", "a"), custom("a b")],
)
def test_a_custom_tool_that_is_wrong_is_refused_with_its_place(client: OpenAI, wrong: Any) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="tiny", messages=MESSAGES, tools=[wrong])
    assert str(refused.value.param).startswith("tools[0]")  # type: ignore[attr-defined]


def test_allowed_tools_may_name_custom_ones(client: OpenAI) -> None:
    chosen: Any = {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "custom", "custom": {"name": "time"}}]},
    }
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, tools=TOOLS, tool_choice=chosen, parallel_tool_calls=False, max_tokens=90
    )
    (made,) = answer.choices[0].message.tool_calls or []
    assert made.type == "custom" and re.fullmatch(PATTERN, made.custom.input)
