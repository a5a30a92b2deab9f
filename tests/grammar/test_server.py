"""Structured outputs and tools through the official client, against a tiny random model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel, Field

from gnomon.generation import Generation
from gnomon.grammar import compile
from gnomon.grammar.calls import FORMS, HERMES, LLAMA3, CallReader, form_of
from gnomon.grammar.tools import tool_grammar
from gnomon.loading import load
from gnomon.model import Model
from gnomon.serve.strict import strict_fault
from helpers.server import serving
from helpers.tiny import write_tiny_model

MESSAGES: list[Any] = [{"role": "user", "content": "abc"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "stop", "description": "Ends."}},
]


class Step(BaseModel):
    name: str = Field(max_length=4)
    done: bool


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A tiny model with room for tools in its prompt."""
    folder = write_tiny_model(tmp_path_factory.mktemp("roomy") / "tiny", max_position_embeddings=4096)
    with load(folder, threads=1, max_sequences=4) as model:
        yield model


@pytest.fixture(scope="module")
def url(roomy: Model) -> Iterator[str]:
    with serving({"tiny": roomy}) as address:
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


def ask(client: OpenAI, **more: Any) -> Any:
    given: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 150, "temperature": 1.0, "seed": 1}
    return client.chat.completions.create(**(given | more))


def test_parse_gives_a_pydantic_value(client: OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Step, max_tokens=60, temperature=1.0, seed=2
    )
    assert isinstance(answer.choices[0].message.parsed, Step)
    assert answer.choices[0].message.refusal is None
    assert answer.usage is not None and answer.usage.model_extra is not None
    assert answer.usage.model_extra["grammar"]["completed"] is True


def test_the_streaming_helper_gives_the_same_value(client: OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=MESSAGES, response_format=Step, max_tokens=60, temperature=1.0, seed=2
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Step)
    assert {"chunk", "content.delta", "content.done"} <= kinds


def test_json_object_is_an_object(client: OpenAI) -> None:
    text = ask(client, response_format={"type": "json_object"}, max_tokens=20).choices[0].message.content
    assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_required_and_named_tools_are_called_with_valid_arguments(client: OpenAI, choice: Any) -> None:
    for seed in range(3):
        answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=seed).choices[0]
        (call,) = answer.message.tool_calls
        assert answer.message.content is None
        assert answer.finish_reason == ("tool_calls" if choice == "required" else "stop")
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert compile(WEATHER).accepts(call.function.arguments)
        else:
            assert choice == "required" and arguments == {}


def test_streamed_calls_have_openais_deltas(client: OpenAI) -> None:
    whole = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=4)
    chunks = list(ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=4, stream=True))
    first = chunks[0].choices[0].delta.model_dump(exclude_unset=True)
    name = whole.choices[0].message.tool_calls[0].function.name
    assert first["role"] == "assistant" and first["content"] is None and first["refusal"] is None
    assert set(first["tool_calls"][0]) == {"index", "id", "type", "function"}
    assert first["tool_calls"][0]["function"] == {"name": name, "arguments": ""}
    for chunk in chunks[1:-1]:
        (call,) = chunk.choices[0].delta.model_dump(exclude_unset=True)["tool_calls"]
        assert set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
    arguments = "".join(c.choices[0].delta.tool_calls[0].function.arguments for c in chunks[:-1])
    assert arguments == whole.choices[0].message.tool_calls[0].function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    assert chunks[-1].choices[0].delta.model_dump(exclude_unset=True) == {}


def test_the_clients_tool_helper_parses_arguments(client: OpenAI) -> None:
    tool = openai.pydantic_function_tool(Step)
    answer = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=[tool], tool_choice="required", parallel_tool_calls=False, max_tokens=90
    )
    (call,) = answer.choices[0].message.tool_calls or []
    assert isinstance(call.function.parsed_arguments, Step)


def test_auto_is_text_or_calls_and_none_is_text(client: OpenAI) -> None:
    auto = ask(client, tools=TOOLS, max_tokens=12).choices[0]
    assert auto.message.content or auto.message.tool_calls
    none = ask(client, tools=TOOLS, tool_choice="none", max_tokens=12).choices[0]
    assert none.message.tool_calls is None and none.finish_reason in ("stop", "length")


def test_allowed_tools_limit_the_choice(client: OpenAI) -> None:
    only = [{"type": "function", "function": {"name": "stop"}}]
    choice = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": only}}
    answer = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in answer.message.tool_calls] == ["stop"]


def test_a_conversation_with_calls_and_results_goes_on(client: OpenAI) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "done"},
    ]
    assert ask(client, messages=messages, tools=TOOLS, max_tokens=5).choices[0].message.content is not None


TAGGED = {
    "type": "structural_tag",
    "format": {"type": "tag", "begin": "a", "content": {"type": "regex", "pattern": "[ab]"}, "end": "b"},
}


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_regex": "[ab]{3}"},
        {"guided_choice": ["aba", "bab"]},
        {"structured_outputs": {"regex": "[ab]{3}"}},
        {"regex": "[ab]{3}"},
        {"ebnf": 'root ::= "aba"'},
        {"grammar": 'root ::= "aba" | "bab"'},
        {"grammar": {"choices": ["aba"]}},
        {"grammar": {"ebnf": "Aba ::= 'aba' | \"bab\""}},
        {"structured_outputs": {"structural_tag": json.dumps(TAGGED)}},
        {"structural_tag": TAGGED},
        {"response_format": TAGGED},
    ],
    ids=str,
)
def test_other_servers_spellings_are_understood(client: OpenAI, fields: dict[str, Any]) -> None:
    text = ask(client, extra_body=fields).choices[0].message.content
    assert len(text) == 3 and set(text) <= set("ab")


def error_of(url: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 50} | fields
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=30)
    assert reply.status_code == 400, reply.text
    error: dict[str, Any] = reply.json()["error"]
    return error


def test_wrong_requests_are_refused_by_name(url: str) -> None:
    bad = {"type": "json_schema", "json_schema": {"name": "N", "schema": {"type": "nothing"}, "strict": True}}
    error = error_of(url, response_format=bad)
    assert error["message"].startswith("Invalid schema for response_format 'N': ")
    assert (error["type"], error["param"]) == ("invalid_request_error", "response_format")
    tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": "http://example.com/x"}}}
    error = error_of(url, tools=[tool])
    assert error["code"] == "invalid_function_parameters" and error["param"] == "tools[0].function.parameters"
    assert error_of(url, tool_choice="required")["param"] == "tool_choice"
    assert (
        error_of(url, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "x"}})["param"]
        == "tool_choice"
    )
    assert error_of(url, guided_regex="a", regex="b")["param"] == "regex"
    assert error_of(url, response_format={"type": "other"})["param"] == "response_format.type"
    assert error_of(url, guided_json=False)["code"] == "invalid_grammar"
    assert error_of(url, guided_regex="a{90}", max_tokens=3)["param"] == "max_tokens"


BOMBS: list[Any] = [
    {"type": "array", "minItems": 10**9},
    {"type": "string", "minLength": 10**9},
    {"enum": [f"value {i}" for i in range(100_000)]},
    {"pattern": "(a+)+$" * 3000},
    {"$ref": "http://169.254.169.254/latest"},
    {"$ref": "file:///etc/passwd"},
]


def nested(depth: int) -> Any:
    schema: Any = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


@pytest.mark.parametrize("schema", [*BOMBS, nested(90), nested(400)], ids=lambda s: str(s)[:30])
def test_a_bomb_is_refused_or_used_and_the_server_lives(url: str, schema: Any) -> None:
    body = {"model": "tiny", "messages": MESSAGES, "max_tokens": 40, "guided_json": schema}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code in (200, 400), reply.text
    assert httpx.get(f"{url}/healthz", timeout=10).status_code == 200


STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        (STRICT, None),
        (
            {**STRICT, "additionalProperties": True},
            "In context=(), 'additionalProperties' is required to be supplied and to be false.",
        ),
        (
            {**STRICT, "required": []},
            "In context=(), 'required' is required to be supplied and to be an array including every key in "
            "properties. Missing 'a'.",
        ),
        ({**STRICT, "required": ["a", "k"]}, "In context=(), Extra required key 'k' supplied."),
        (
            {**STRICT, "properties": {"a": {"allOf": []}}},
            "In context=('properties', 'a'), 'allOf' is not permitted.",
        ),
        ({"type": "array"}, "schema must be a JSON Schema of 'type: \"object\"', got 'type: \"array\"'."),
    ],
    ids=str,
)
def test_strict_profiles_speak_openais_words(schema: Any, words: str | None) -> None:
    assert strict_fault(schema, "openai") == words
    assert strict_fault(schema, "open") is None


def test_the_older_profile_counts_properties_and_levels() -> None:
    many = {f"p{i}": {"type": "string"} for i in range(101)}
    schema = {"type": "object", "properties": many, "required": list(many), "additionalProperties": False}
    assert "101 properties" in str(strict_fault(schema, "openai-2024"))
    assert strict_fault(schema, "openai") is None


def test_a_profile_is_the_operators_choice(tiny: Model) -> None:
    loose = {"type": "json_schema", "json_schema": {"name": "N", "schema": {"type": "object"}, "strict": True}}
    with serving({"tiny": tiny}, strict_profile="openai") as address:
        error = error_of(address, response_format=loose)
    assert error["message"] == (
        "Invalid schema for response_format 'N': In context=(), "
        "'additionalProperties' is required to be supplied and to be false."
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=lambda form: form.name)
def test_a_text_is_read_alike_however_it_is_split(form: Any) -> None:
    text = "Sure <tool " if form.several else ""
    text += form.opening("f") + '{"a": "}x{\\n"}' + form.tail
    if form.several:
        text += form.between + form.opening("g") + "{}" + form.tail
    whole = CallReader(form)
    whole.push(text)
    single = CallReader(form)
    pieces = [piece for character in text for piece in single.push(character)]
    assert single.calls == whole.calls and len(whole.calls) == (2 if form.several else 1)
    content = "".join(piece.text for piece in pieces if piece.kind == "content")
    assert content == ("Sure <tool " if form.several else "")


def test_free_text_cannot_hold_half_a_call() -> None:
    grammar = tool_grammar([{"name": "f", "parameters": None}], HERMES, choice="auto", parallel=True)
    assert grammar.accepts("plain text, and <tool too")
    assert not grammar.accepts("<tool_call>\nnonsense")
    assert not grammar.accepts('<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>')
    assert grammar.accepts('So: <tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>')


def test_arguments_are_checked_behind_the_mask(tiny: Model) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [1, 2]}, "minItems": 2}}}
    schema["properties"]["a"]["uniqueItems"] = True  # type: ignore[index]
    schema |= {"required": ["a"], "additionalProperties": False}
    tools = {"functions": [{"name": "f", "parameters": schema}], "choice": "required", "parallel": False}
    for seed in range(2):
        made = tiny.generate("abc", grammar={"tools": tools}, temperature=1.5, seed=seed, max_tokens=70)
        assert isinstance(made, Generation)
        reader = CallReader(HERMES)
        reader.push(made.text)
        assert compile(schema).accepts(reader.calls[0].arguments), made.text


def test_the_template_says_how_calls_are_written() -> None:
    assert form_of("{{ tools }} <tool_call>") is HERMES
    assert form_of('{% if tools %} {"name": n, "parameters": p} {% endif %}') is LLAMA3
    assert form_of("{{ messages }}") is HERMES


def test_a_prompt_that_the_guard_refuses_is_a_refusal_where_a_structured_answer_was_asked_for(client: OpenAI) -> None:
    guard = {"guard": {"input": [{"use": "words", "words": ["bomb"], "action": "block"}]}}
    asked: list[Any] = [{"role": "user", "content": "a bomb"}]
    answer = client.chat.completions.parse(
        model="tiny", messages=asked, response_format=Step, max_tokens=60, extra_body=guard, n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert choice.finish_reason == "stop" and choice.message.content is None and choice.message.parsed is None
        assert choice.message.refusal == "The prompt was refused by the guard: words."
    with client.chat.completions.stream(
        model="tiny", messages=asked, response_format=Step, max_tokens=60, extra_body=guard
    ) as stream:
        told = [event.delta for event in stream if event.type == "refusal.delta"]
        final = stream.get_final_completion().choices[0].message
    assert "".join(told) == final.refusal == "The prompt was refused by the guard: words." and final.parsed is None
    allowed = client.chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Step, max_tokens=60, extra_body=guard
    )
    assert allowed.choices[0].message.parsed is not None and allowed.choices[0].message.refusal is None
