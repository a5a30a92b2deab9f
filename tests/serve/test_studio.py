"""The studio page in a real Chromium."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from conftest import need
from gnomon.model import Model
from helpers.late import late_scanner
from helpers.saying import saying
from helpers.server import serving

pytestmark = pytest.mark.browser
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    path = shutil.which("chromium")
    need(path is not None, "no chromium (apt-get install chromium)", "GNOMON_REQUIRE_BROWSER")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser: Any, tiny: Model) -> Iterator[Any]:
    with serving({"tiny": tiny}) as address:
        context = browser.new_context(viewport={"width": 1100, "height": 700})
        page = context.new_page()
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on(
            "requestfailed", lambda request: problems.append(request.url) if "completions" not in request.url else None
        )
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.address = address
        yield page
        context.close()
        assert not problems


def ask(page: Any, text: str, most: int = 20) -> None:
    page.fill("#message", text)
    page.evaluate(f"document.querySelector('[name=max_tokens]').value = {most}")
    page.press("#message", "Enter")


def test_a_question_is_answered_with_model_seed_and_fingerprint_shown(page: Any, tiny: Model) -> None:
    assert tiny.fingerprint in page.inner_text("#fingerprint")
    ask(page, "hello")
    page.wait_for_selector(".assistant .footnote")
    expected = tiny.chat("hello", max_tokens=20, repetition_penalty=1.0)
    assert page.inner_text(".user") == "hello"
    shown = page.evaluate("document.querySelector('.assistant > span').textContent")
    assert shown == expected.text  # type: ignore[union-attr]
    assert "seed" in page.inner_text(".assistant .footnote")


def test_hovering_a_token_shows_its_probability_and_the_alternatives(page: Any) -> None:
    ask(page, "abc")
    page.wait_for_selector(".assistant .footnote")
    page.click("#tokens")
    page.locator(".token").nth(1).hover()
    page.wait_for_selector("#tip:not([hidden]) tr.chosen")
    assert page.locator("#tip tr").count() >= 5
    assert "%" in page.inner_text("#tip")


def test_stop_ends_the_answer_and_the_decoding(page: Any, tiny: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiny.worker is not None
    step = tiny.worker._engine.step
    monkeypatch.setattr(tiny.worker._engine, "step", lambda: (time.sleep(0.02), step())[1])  # time to press a key
    page.route(
        "**/v1/chat/completions",
        lambda route: route.continue_(post_data=route.request.post_data[:-1] + ',"ignore_eos":true}'),
    )
    ask(page, "go on and on", most=400)
    page.wait_for_selector("#stop:not([hidden])")
    page.wait_for_selector(".assistant .token")
    page.keyboard.press("Escape")
    page.wait_for_selector("text=stopped")
    page.wait_for_timeout(500)
    assert tiny.stats().running == 0


def test_settings_act_and_are_kept(page: Any) -> None:
    page.click("#settings-toggle")
    page.fill("[name=seed]", "7")
    page.fill("[name=system]", "Be brief.")
    sent: list[Any] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if "completions" in request.url else None)
    ask(page, "x", most=3)
    page.wait_for_selector(".assistant .footnote")
    assert sent[0]["seed"] == 7 and sent[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    assert page.input_value("[name=seed]") == "7"


def test_the_page_fits_a_phone_and_has_a_dark_side(page: Any) -> None:
    page.set_viewport_size({"width": 375, "height": 667})
    ask(page, "word " * 40)
    page.wait_for_selector(".assistant .footnote")
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != light


def test_text_taken_back_vanishes_and_a_mark_stands_in_its_place(page: Any, tiny: Model) -> None:
    checks: list[dict[str, Any]] = [
        {"use": "regex", "name": "key", "regex": "K[0-9]{4}"},
        {"use": "t_late", "action": "block", "mode": "async", "max_exposure_chars": 20, "timeout_ms": 60_000},
    ]
    said = "The key is K1234, kept. Some ugly thing now. " + "And on it goes. " * 10
    policy = {"output": checks, "on_block": {"message": " Enough."}}
    with late_scanner("ugly") as late, saying(tiny, guard=policy, say={"text": said}):
        ask(page, "abc", 400)
        page.wait_for_selector(".assistant >> text=Some ugly")
        assert late.looked.wait(60)
        late.go.set()
        page.wait_for_selector("text=ended by the guard")
    answer = page.locator(".assistant > span").first
    assert answer.inner_text() == "The key is key, kept.taken back Enough."
    assert page.inner_text("del.retracted") == "taken back" and page.inner_text("mark.redacted") == "key"
    if folder := os.environ.get("GNOMON_SCREENSHOTS"):
        page.click(".findings summary")
        page.screenshot(path=f"{folder}/retracted.png")


def test_held_text_is_grey_until_it_is_cleared(page: Any, tiny: Model) -> None:
    """The text itself has not left the server: as many blocks as it has characters stand for it."""
    said = "All is well here. The key is ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l, keep it. Goodbye then."
    checks: list[Any] = ["secrets", {"use": "t_late", "action": "block", "timeout_ms": 60_000}]
    with late_scanner("keep", score=0.0) as late, saying(tiny, guard={"output": checks}, say={"text": said}):
        ask(page, "abc", 400)
        wanted = len(said) - len("All is well here.")
        page.wait_for_selector(f".held[title^='{wanted} ']")
        answer = page.locator(".assistant > span").first
        assert answer.inner_text() == "All is well here." + "\u2591" * wanted
        assert "held by the guard" in page.get_attribute(".held", "aria-label")
        assert "keep" not in page.content() and "github-token" not in page.content()
        if folder := os.environ.get("GNOMON_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/held.png", clip={"x": 0, "y": 0, "width": 1100, "height": 240})
        late.go.set()
        page.wait_for_selector(".findings")
    assert page.locator(".held").count() == 0
    assert answer.inner_text() == "All is well here. The key is github-token, keep it. Goodbye then."
    assert page.inner_text("mark.redacted") == "github-token"


def test_model_text_is_never_markup(page: Any) -> None:
    ask(page, "<img src=x onerror=alert(1)>")
    page.wait_for_selector(".assistant .footnote")
    assert page.locator("#conversation img").count() == 0


def test_redactions_are_marked_and_findings_listed(page: Any, tiny: Model) -> None:
    said = "The key is ghp_9rtqamlth6e39ixjq0ji9qzqs7cxfl909k1l, keep it."
    with saying(tiny, guard={"output": ["secrets"]}, say={"text": said}):
        ask(page, "abc", 100)
        page.wait_for_selector(".findings")
        assert page.inner_text("mark.redacted") == "github-token"
        assert "ghp_" not in page.inner_text("#conversation")
        page.click(".findings summary")
        assert "github-token" in page.inner_text(".findings table")
        if folder := os.environ.get("GNOMON_SCREENSHOTS"):
            page.screenshot(path=f"{folder}/guard.png")
    with saying(tiny, guard={"output": [{"use": "secrets", "action": "block"}]}, say={"text": said}):
        ask(page, "abc", 100)
        page.wait_for_selector("text=ended by the guard")
