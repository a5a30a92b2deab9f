"""Tool calls as Mistral's and Gemma's models write them: control tokens that are text, and JSON asked for in words."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from gnomon.grammar.calls import GEMMA, HERMES, MISTRAL, MISTRAL_NAMED, CallReader, form_of
from gnomon.grammar.plans import make, plan_of, restore
from gnomon.grammar.tools import tool_grammar
from gnomon.loading import load
from gnomon.model import Model
from gnomon.serve.toolcalls import told, tool_use
from helpers.server import serving
from helpers.tiny import tiny_tokenizer, write_tiny_model

TOOL = {
    "name": "pick",
    "parameters": {
        "type": "object",
        "properties": {"n": {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2}},
        "required": ["n"],
        "additionalProperties": False,
    },
}
OTHER = {"name": "stop", "parameters": None}
LISTED = "{% for m in messages %}[INST]{{ m.content }}[/INST]{% endfor %}{% if tools %}[TOOL_CALLS] [{% endif %}"
NAMED = LISTED + "{# [TOOL_CALLS]name[ARGS] #}"
ASKED = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"


def test_the_template_says_which_form_it_is() -> None:
    assert form_of(LISTED) is MISTRAL and form_of(NAMED) is MISTRAL_NAMED
    assert form_of(NAMED + "[CALL_ID]") is MISTRAL
    assert form_of(ASKED) is GEMMA and form_of("{{ messages }}") is HERMES


@pytest.mark.parametrize(
    ("form", "right", "wrong"),
    [
        (
            MISTRAL,
            ['[TOOL_CALLS] [{"name": "pick", "arguments": {"n": [1, 2]}}]', "text [TOOL_"],
            ['[TOOL_CALLS] [{"name": "pick", "arguments": {"n": [1, 1]}}]', "[TOOL_CALLS]", "[TOOL_CALLS] [{}]"],
        ),
        (
            MISTRAL_NAMED,
            ['[TOOL_CALLS]pick[ARGS]{"n": [3, 1]}', "[TOOL_CALLS]stop[ARGS]{}[TOOL_CALLS]stop[ARGS]{}", "no call"],
            ['[TOOL_CALLS]pick[ARGS]{"n": [3, 3]}', "[TOOL_CALLS]stop", "[TOOL_CALLS]other[ARGS]{}"],
        ),
        (
            GEMMA,
            ['{"name": "pick", "parameters": {"n": [2, 3]}}', "text"],
            ['{"name": "pick", "parameters": {"n": [2, 2]}}', '{"name": "x"'],
        ),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_each_form_takes_its_calls_and_nothing_half(form: Any, right: list[str], wrong: list[str]) -> None:
    tools = {"functions": [TOOL, OTHER], "form": form.name, "choice": "auto", "parallel": True, "content": None}
    made = tool_grammar([TOOL, OTHER], form, choice="auto", parallel=True)
    again = restore({"tools": tools}, plan_of(make({"tools": tools})))
    assert made.controls == again.controls == form.controls
    for grammar in (made, again):
        assert [text for text in right if not grammar.accepts(text)] == []
        assert [text for text in wrong if grammar.accepts(text)] == []


@pytest.mark.parametrize("form", [MISTRAL, MISTRAL_NAMED], ids=lambda form: form.name)
def test_calls_are_read_alike_however_the_text_is_split(form: Any) -> None:
    arguments = '{"a": [{"b": "}]"}]}'
    text = "so: " + form.opening("f") + arguments + form.tail
    for size in (1, 3, len(text)):
        reader = CallReader(form)
        pieces = [p for at in range(0, len(text), size) for p in reader.push(text[at : at + size])] + reader.finish()
        assert [(call.name, call.arguments) for call in reader.calls] == [("f", arguments)]
        assert "".join(piece.text for piece in pieces if piece.kind == "content") == "so: "


def tiny_with(template: str, folder: Path, controls: list[str]) -> Path:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens(controls)
    write_tiny_model(folder, tokenizer=tokenizer, max_position_embeddings=4096)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
    return folder


@pytest.fixture(scope="module", params=["list", "named"])
def mistral(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    """A tiny model whose tokenizer has Mistral's control tokens, and whose template shows them."""
    folder = tmp_path_factory.mktemp("models") / "tiny-mistral"
    template = LISTED if request.param == "list" else NAMED
    with load(tiny_with(template, folder, ["[TOOL_CALLS]", "[ARGS]"]), threads=1, max_sequences=4) as model:
        yield model


def test_a_forced_call_is_written_with_the_control_token_itself_and_read_again(mistral: Model) -> None:
    token = mistral.tokenizer.ids_of_controls(["[TOOL_CALLS]"])["[TOOL_CALLS]"]
    options = {"functions": [TOOL], "form": form_of(mistral.template.source).name, "choice": "required"}
    done = mistral.generate("abc", grammar={"tools": options}, max_tokens=120, temperature=1.2, seed=3)
    assert not isinstance(done, list) and done.completed
    assert done.token_ids[0] == token and done.text.startswith("[TOOL_CALLS]")
    reader = CallReader(form_of(mistral.template.source))
    reader.push(done.text)
    (call, *_) = reader.calls
    assert call.name == "pick" and len(set(json.loads(call.arguments)["n"])) >= 2


def test_elsewhere_the_control_token_is_no_text(mistral: Model) -> None:
    token = mistral.tokenizer.ids_of_controls(["[TOOL_CALLS]"])["[TOOL_CALLS]"]
    done = mistral.generate("abc", grammar={"regex": ".{3}"}, max_tokens=8, logit_bias={str(token): 100.0}, seed=1)
    assert not isinstance(done, list) and token not in done.token_ids


def test_the_official_client_gets_calls_and_sends_results(mistral: Model) -> None:
    tools: Any = [{"type": "function", "function": TOOL}]
    messages: list[Any] = [{"role": "user", "content": "abc"}]
    with serving({"tiny": mistral}) as url:
        client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
        given: Any = {"model": "tiny", "tools": tools, "max_tokens": 120, "temperature": 1.0, "seed": 2}
        answer = client.chat.completions.create(messages=messages, tool_choice="required", **given).choices[0]
        assert answer.finish_reason == "tool_calls" and answer.message.tool_calls
        call = answer.message.tool_calls[0]
        assert json.loads(call.function.arguments)["n"] and not answer.message.content
        streamed = client.chat.completions.create(messages=messages, tool_choice="required", stream=True, **given)
        pieces = [part for chunk in streamed for part in (chunk.choices[0].delta.tool_calls or [])]
        assert pieces[0].function.name == "pick"
        first = "".join(piece.function.arguments or "" for piece in pieces if piece.index == 0)
        assert first == call.function.arguments
        messages += [answer.message.to_dict(), {"role": "tool", "tool_call_id": call.id, "content": "done"}]
        again = client.chat.completions.create(messages=messages, tool_choice="none", **given | {"max_tokens": 4})
        assert again.choices[0].finish_reason in ("stop", "length")


def test_mistrals_templates_get_ids_of_nine_letters(mistral: Model) -> None:
    call = {"id": "call_123", "type": "function", "function": {"name": "pick", "arguments": "{}"}}
    sent = [{"role": "assistant", "tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_123", "content": "x"}]
    messages, _ = told(mistral, sent, None, {})
    assert messages[0]["tool_calls"][0]["id"] == messages[1]["tool_call_id"]
    assert len(messages[1]["tool_call_id"]) == 9


def test_gemma_is_asked_in_words_and_answers_with_an_object(tmp_path: Path) -> None:
    tools: Any = [{"type": "function", "function": TOOL}]
    with load(tiny_with(ASKED, tmp_path / "gemma", []), threads=1, max_sequences=4) as model:
        use = tool_use(tools, "required", None, "open")
        messages, _ = told(model, [{"role": "user", "content": "abc"}], use, {})
        assert (
            '{"name": "NAME", "parameters": ' in messages[0]["content"] and "<tool_call>" not in messages[0]["content"]
        )
        results = [{"role": "tool", "content": "1"}, {"role": "tool", "content": "2"}]
        assert [message["role"] for message in told(model, results, use, {})[0]] == ["system", "user"]
        with serving({"tiny": model}) as url:
            client = OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)
            answer = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": "abc"}],
                tools=tools,
                tool_choice="required",
                max_tokens=120,
                temperature=1.0,
                seed=2,
            ).choices[0]
        assert answer.message.tool_calls and answer.message.tool_calls[0].function.name == "pick"
