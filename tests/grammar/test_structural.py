"""Structural tags: free text with tags that are held to something; both spellings; through decoding and the server."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gnomon.errors import GrammarError
from gnomon.grammar import compile
from gnomon.grammar.options import GrammarOptions, parse_text
from gnomon.grammar.plans import make, plan_of, restore
from gnomon.model import Model

CITY = {"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}
CITY["additionalProperties"] = False
UNIQUE = {"type": "array", "items": {"enum": [1, 2, 3]}, "uniqueItems": True, "minItems": 2}
OLDER = {
    "type": "structural_tag",
    "structures": [
        {"begin": "<function=city>", "schema": CITY, "end": "</function>"},
        {"begin": "<function=pick>", "schema": UNIQUE, "end": "</function>"},
    ],
    "triggers": ["<function="],
}


def tags(kind: str, **more: Any) -> dict[str, Any]:
    return {"type": "structural_tag", "format": {"type": kind, **more}}


A = {"begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
B = {"begin": "<b>", "content": {"type": "regex", "pattern": "[0-9]+"}, "end": "</b>"}
X = {"type": "const_string", "value": "x"}


@pytest.mark.parametrize(
    ("tag", "right", "wrong"),
    [
        (
            OLDER,
            ["", "any\ntext <b>", 'a <function=city>{"city":"Rome"}</function> b', "<function=pick>[1,2]</function>"],
            ["<function=", "<function=town>", "<function=city>{}</function>", "<function=pick>[1,1]</function>"],
        ),
        (
            tags("triggered_tags", triggers=["<a>", "<b>"], tags=[A, B], at_least_one=True, stop_after_first=True),
            ["q<a>t</a>", "<b>12</b>"],
            ["", "q", "<b>x</b>", "<a></a>q", "<a></a><b>1</b>"],
        ),
        (
            tags("triggered_tags", triggers=["<a>"], tags=[A], excludes=["zz"]),
            ["z<a>zz</a>z"],
            ["zz", "zz<a></a>", "<a></a>zz"],
        ),
        (tags("tags_with_separator", separator=", ", tags=[B]), ["", "<b>1</b>, <b>2</b>"], ["<b>1</b><b>2</b>"]),
        (
            tags("sequence", elements=[{"type": "tag", **A}, {"type": "json_schema", "json_schema": CITY}]),
            ['<a>why</a>{"city":"Oslo"}'],
            ['{"city":"Oslo"}', "<a>why</a>"],
        ),
        (tags("or", elements=[X, {"type": "grammar", "grammar": 'root ::= "y"+'}]), ["x", "yy"], ["", "xy"]),
        (tags("repeat", content=X, min=2, max=3), ["xx", "xxx"], ["x", "xxxx"]),
        (tags("optional", content=X), ["", "x"], ["xx"]),
        (tags("plus", content=X), ["x", "xx"], [""]),
        (tags("star", content=X), ["", "xx"], ["y"]),
        (tags("any_text", excludes=["no"]), ["yes"], ["a no"]),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_each_format_takes_what_it_says(tag: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    grammar = compile(structural_tag=tag)
    restored = restore({"structural_tag": tag}, plan_of(make({"structural_tag": tag})))
    for one in (grammar, restored):
        assert [text for text in right if not one.accepts(text)] == []
        assert [text for text in wrong if one.accepts(text)] == []
    assert grammar.accepts(grammar.shortest())


@pytest.mark.parametrize(
    ("tag", "said"),
    [
        ({}, "structures"),
        (tags("dance"), "'dance'"),
        (tags("_add"), "'_add'"),
        (tags("triggered_tags", triggers=["<c>"], tags=[A]), "no trigger"),
        (tags("sequence", elements=[]), "elements"),
        (tags("repeat", content=X, min=5, max=2), "counts"),
        (tags("regex", pattern="("), "grammar|pattern|regex|enforced"),
        (tags("json_schema", json_schema={"type": "foo"}), "type"),
        (tags("json_schema", json_schema=UNIQUE), "checked afterwards"),
        ({**OLDER, "triggers": []}, "triggers"),
    ],
    ids=lambda value: json.dumps(value)[:40] if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_refused_by_name(tag: dict[str, Any], said: str) -> None:
    with pytest.raises(GrammarError, match=said):
        compile(structural_tag=tag)


def test_a_file_and_a_plain_value_may_be_a_structural_tag() -> None:
    assert parse_text(json.dumps(OLDER)) == {"structural_tag": OLDER}
    assert GrammarOptions.model_validate(OLDER).structural_tag == OLDER


def test_what_stands_in_a_tag_is_valid_whatever_the_model_wants(tiny: Model) -> None:
    """The tiny model writes noise: with at_least_one a tag must come, and a check that fails is taken back."""
    tag = tags(
        "triggered_tags",
        triggers=["<p>"],
        tags=[{"begin": "<p>", "content": {"type": "json_schema", "json_schema": UNIQUE}, "end": "</p>"}],
        at_least_one=True,
    )
    grammar = compile(structural_tag=tag)
    for seed in range(4):
        done = tiny.generate("abc", grammar=grammar, max_tokens=40, temperature=1.5, seed=seed)
        assert not isinstance(done, list)
        assert done.completed and grammar.accepts(done.text), done.text
        value = json.loads(done.text.split("<p>")[1].split("</p>")[0])
        assert len(set(value)) == len(value) >= 2
