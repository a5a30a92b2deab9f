"""The studio's grammar panel in a real Chromium."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import need
from gnomon.model import Model
from helpers.server import serving

pytestmark = pytest.mark.browser
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "t": {"type": "array", "items": {"enum": [1, 2]}, "uniqueItems": True}},
    "required": ["n", "t"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def page(tiny: Model) -> Iterator[Any]:
    path = shutil.which("chromium")
    need(path is not None, "no chromium (apt-get install chromium)", "GNOMON_REQUIRE_BROWSER")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright, serving({"tiny": tiny}) as address:
        chromium = playwright.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        page = chromium.new_page(viewport={"width": 1180, "height": 760})
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.click("#grammar-toggle")
        yield page
        chromium.close()
        assert not problems


def write(page: Any, kind: str, text: str) -> None:
    page.select_option("#grammar-kind", kind)
    page.fill("#grammar-source", text)


def test_a_schema_is_checked_while_it_is_typed(page: Any) -> None:
    write(page, "schema", '{"type": "integer", ')
    page.wait_for_selector("#grammar-status.wrong:has-text('Not JSON yet')")
    write(page, "schema", '{"type": "integr"}')
    page.wait_for_selector("#grammar-status.wrong:has-text('#/type')")
    write(page, "schema", '{"type": "integer", "minimum": 3, "maximum": 2}')
    page.wait_for_selector("#grammar-status.wrong:has-text('No text satisfies this')")
    write(page, "schema", json.dumps(SCHEMA))
    page.wait_for_selector('#grammar-status.right:has-text(\'shortest: {"n":0,"t":[]}\')')
    assert "/properties/t/uniqueItems" in page.inner_text("#grammar-report")
    assert "checked when its value closes" in page.inner_text("#grammar-report")


def test_the_answer_keeps_to_it_and_its_tokens_are_coloured_by_what_happened(page: Any, tiny: Model) -> None:
    write(page, "schema", json.dumps(SCHEMA))
    page.wait_for_selector("#grammar-status.right")
    page.check("#grammar-on")
    page.fill("#message", "abc")
    page.evaluate("document.querySelector('[name=max_tokens]').value = 40")
    page.press("#message", "Enter")
    page.wait_for_selector(".assistant .footnote:has-text('the grammar kept')")
    value = json.loads(page.evaluate("document.querySelector('.assistant > span').textContent"))
    assert set(value) == {"n", "t"}
    expected = tiny.chat("abc", grammar=SCHEMA, max_tokens=40, repetition_penalty=1.0)
    assert expected.trace is not None  # type: ignore[union-attr]
    kinds = page.evaluate("[...document.querySelectorAll('.assistant .token')].map((one) => one.classList[1])")
    assert kinds == expected.trace.kinds[: len(kinds)] and {"forced"} < set(kinds)  # type: ignore[union-attr]
    page.click("#tokens")
    page.locator(".assistant .token").nth(2).hover()
    page.wait_for_selector("#tip:not([hidden]) tr:has-text('kept by the grammar')")
    if folder := os.environ.get("GNOMON_SCREENSHOTS"):
        page.screenshot(path=f"{folder}/grammar.png")
    page.click("#tokens")


@pytest.mark.parametrize(("kind", "text"), [("choices", "red\nblue"), ("regex", "[ab]{3}"), ("gbnf", 'root ::= "x"')])
def test_every_kind_is_checked_and_used(page: Any, kind: str, text: str) -> None:
    write(page, kind, text)
    page.click("#clear")
    page.check("#grammar-on")
    page.fill("#message", "abc")
    page.press("#message", "Enter")
    page.wait_for_selector(".assistant .footnote")
    said = page.evaluate("document.querySelector('.assistant > span').textContent")
    allowed = {"choices": {"red", "blue"}, "gbnf": {"x"}}.get(kind)
    assert said in allowed if allowed else (len(said) == 3 and set(said) <= set("ab"))


def test_a_grammar_that_is_wrong_is_never_left_out_silently(page: Any) -> None:
    write(page, "regex", "(")
    page.check("#grammar-on")
    page.fill("#message", "abc")
    page.press("#message", "Enter")
    page.wait_for_selector(".error:has-text('The grammar cannot be used')")


def test_what_was_typed_is_there_after_a_reload(page: Any) -> None:
    write(page, "regex", "[xyz]{2}")
    page.wait_for_selector("#grammar-status.right")
    page.reload()
    page.click("#grammar-toggle")
    assert page.input_value("#grammar-source") == "[xyz]{2}"
    assert page.is_checked("#grammar-on")
