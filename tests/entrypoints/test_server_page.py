"""The chat page in a real browser."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api")
pytest.importorskip("fastapi")

from anyfp4 import LLM, SamplingParams  # noqa: E402
from tests.entrypoints.serving import MODEL, Running, serving, slow, wait_until  # noqa: E402

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
pytestmark = pytest.mark.skipif(not CHROMIUM.exists(), reason=f"needs {CHROMIUM}")
MILLISECONDS = 15_000


@pytest.fixture(scope="module")
def server(tiny_model: Path) -> Iterator[Running]:
    with serving(tiny_model, prepare=slow(0.01)) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        yield launched
        launched.close()


@pytest.fixture
def page(browser: Any) -> Iterator[Any]:
    """A fresh visitor; anything that the page complains about in the console fails the test."""
    context = browser.new_context(viewport={"width": 900, "height": 760})
    made = context.new_page()
    made.set_default_timeout(MILLISECONDS)
    complaints: list[str] = []
    made.on("pageerror", lambda error: complaints.append(str(error)))
    made.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
    made.complaints = complaints
    yield made
    context.close()
    assert [c for c in complaints if "Failed to load resource" not in c] == []


def wait_for(page: Any, expression: str) -> None:
    """Asks again and again from outside: the page's policy forbids a condition that is polled inside."""
    wait_until(lambda: page.evaluate(expression), expression)


def visit(page: Any, server: Running) -> None:
    page.goto(server.url + "/")
    wait_for(page, "document.getElementById('model').textContent !== '…'")


def settings(page: Any, **values: str) -> None:
    page.click("#show-settings")
    for name, value in values.items():
        page.fill("#" + name.replace("_", "-"), value)
    page.click("#show-settings")


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def done(page: Any) -> None:
    page.wait_for_selector("#stop", state="hidden")
    page.wait_for_selector("#send", state="visible")


def test_a_conversation(page: Any, server: Running, tiny_model: Path) -> None:
    visit(page, server)
    assert MODEL in page.inner_text("#model") and "256 tokens" in page.inner_text("#model")
    settings(page, temperature="0.9", seed="5", max_tokens="12", system="be brief")
    ask(page, "héllo")
    done(page)
    llm = LLM(tiny_model)
    params = SamplingParams(temperature=0.9, seed=5, max_tokens=12, logprobs=5)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "héllo"}]
    want = llm.chat(messages, params)[0].outputs[0]
    answer = page.locator(".message.assistant .text")
    # special tokens are shown, but are no part of the text
    text = answer.evaluate(
        "e => [...e.childNodes].filter(n => !n.classList?.contains('special')).map(n => n.textContent).join('')"
    )
    assert text == want.text
    figures = page.inner_text(".figures")
    assert re.search(r"[\d.]+ tokens/s · first token after [\d.]+ s · 12 tokens", figures)
    assert "cut off at the limit" in figures
    assert page.inner_text(".message.user .text") == "héllo"

    # the second question carries the first one along
    with page.expect_request("**/v1/chat/completions") as sent:
        ask(page, "go on")
    body = sent.value.post_data_json
    assert [m["role"] for m in body["messages"]] == ["system", "user", "assistant", "user"]
    assert body["messages"][2]["content"] == want.text and body["seed"] == 5
    done(page)
    assert page.locator(".message").count() == 4
    page.click("#new")
    assert page.locator(".message").count() == 0 and page.is_visible("#empty")


def test_logprobs_on_hover_and_by_keyboard(page: Any, server: Running, tiny_model: Path) -> None:
    visit(page, server)
    settings(page, temperature="0", max_tokens="6")
    ask(page, "hello")
    done(page)
    want = LLM(tiny_model).chat(
        [{"role": "user", "content": "hello"}], SamplingParams(temperature=0, max_tokens=6, logprobs=5)
    )
    completion = want[0].outputs[0]
    assert completion.logprobs is not None
    assert page.is_hidden("#tip")
    first = page.locator(".tok").first
    first.hover()
    tip = page.locator("#tip")
    own = completion.logprobs[0]
    assert f"logprob {own[completion.token_ids[0]].logprob:.4f}" in tip.inner_text()
    assert tip.locator("tr").count() == 5 and tip.locator("tr.chosen").count() == 1
    box = tip.bounding_box()
    assert box["x"] >= 0 and box["y"] >= 0 and box["x"] + box["width"] <= 900
    page.locator("h1").hover()
    assert page.is_hidden("#tip")

    page.locator(".message.assistant .text").focus()
    page.keyboard.press("ArrowRight")
    assert first.evaluate("e => e.classList.contains('here')") and page.is_visible("#tip")
    assert "%" in page.inner_text("#spoken")
    page.keyboard.press("End")
    assert page.locator(".tok").last.evaluate("e => e.classList.contains('here')")
    page.keyboard.press("Escape")
    assert page.is_hidden("#tip")


def test_half_characters_are_shown_with_the_token_that_completes_them(page: Any, server: Running) -> None:
    visit(page, server)
    page.evaluate(
        """() => {
          const answer = new Answer();
          document.getElementById('log').append(answer.box);
          const token = (bytes) => ({ token: '\\ufffd', bytes, logprob: -1, top_logprobs: [] });
          const chunk = (content, tokens) => ({ choices: [{ delta: { content }, logprobs: { content: tokens } }] });
          answer.take(chunk('', [token([0xe2])]));
          answer.take(chunk('', [token([0x98])]));
          answer.take(chunk('☕!', [token([0x95]), { ...token([0x21]), token: '!' }]));
          answer.take(chunk('', [token([0xff])]));
          answer.end();
        }"""
    )
    spans = page.locator(".tok")
    assert [spans.nth(i).inner_text() for i in range(spans.count())] == ["☕", "!", "�"]
    spans.first.hover()
    assert page.locator("#tip table").count() == 3


def test_stop(page: Any, server: Running) -> None:
    visit(page, server)
    settings(page, temperature="0", seed="1")
    for way in ("button", "key"):
        ask(page, "hello")
        page.wait_for_selector(".message.assistant:last-child .tok")
        assert server.stats().running == 1
        page.click("#stop") if way == "button" else page.keyboard.press("Escape")
        done(page)
        assert "stopped" in page.locator(".figures").last.inner_text()
        wait_until(lambda: server.stats().kv_blocks_used == 0, "the blocks of a stopped answer")


def test_errors_are_shown(page: Any, server: Running) -> None:
    visit(page, server)
    settings(page, max_tokens="9999")
    ask(page, "hello")
    page.wait_for_selector("#alarm", state="visible")
    assert "max_completion_tokens" in page.inner_text("#alarm")
    assert page.input_value("#prompt") == "hello"  # not lost
    assert page.locator(".message").count() == 0
    page.click("#show-settings")
    page.fill("#temperature", "-1")
    page.click("#show-settings")
    ask(page, "hello")
    assert page.is_visible("#settings")  # where the wrong value is
    page.fill("#temperature", "0")
    page.fill("#max-tokens", "2")
    ask(page, "hello")
    done(page)
    assert page.is_hidden("#alarm") and page.locator(".message").count() == 2
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "again")
    page.wait_for_selector("#alarm", state="visible")
    assert "cannot be reached" in page.inner_text("#alarm")


def test_api_key_is_asked_for(page: Any, tiny_model: Path) -> None:
    with serving(tiny_model, api_key="s3cret") as server:
        page.goto(server.url + "/")
        page.wait_for_selector("#alarm", state="visible")
        assert "API key" in page.inner_text("#alarm")
        assert page.evaluate("document.activeElement.id") == "key"
        page.keyboard.type("wrong")
        page.keyboard.press("Tab")
        wait_for(page, "document.getElementById('alarm').textContent.includes('not right')")
        page.fill("#key", "s3cret")
        page.press("#key", "Tab")
        wait_for(page, "document.getElementById('model').textContent.includes('tiny')")
        assert page.is_hidden("#alarm")
        page.fill("#max-tokens", "3")
        ask(page, "hello")
        done(page)
        assert page.locator(".tok").count() >= 1
        page.goto("about:blank")


def test_dark_and_light(page: Any, server: Running) -> None:
    colours = {}
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        visit(page, server)
        colours[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert colours["light"] != colours["dark"]
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["light"]
    page.reload()  # the choice stays
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == colours["light"]


def test_everything_has_a_name_and_nothing_sticks_out(page: Any, server: Running) -> None:
    visit(page, server)
    page.click("#show-settings")
    assert page.get_attribute("#show-settings", "aria-expanded") == "true"
    unnamed = page.evaluate(
        """() => [...document.querySelectorAll('button, input, textarea')]
          .filter(e => !(e.labels?.length || e.textContent.trim() || e.getAttribute('aria-label'))).map(e => e.id)"""
    )
    assert unnamed == []
    page.set_viewport_size({"width": 340, "height": 640})
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_policy_lets_nothing_foreign_in(page: Any, server: Running) -> None:
    response = page.goto(server.url + "/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    wait_for(page, "document.getElementById('model').textContent !== '…'")
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.bad = 1'}))"
    )
    assert page.evaluate("window.bad") is None
    time.sleep(0.1)
    assert any("Content Security Policy" in c for c in page.complaints)
    page.complaints.clear()
    # no address of another host in the page, but for the name of SVG's namespace
    text = response.text()
    assert re.findall(r"https?://[^'\"]+", text) == ["http://www.w3.org/2000/svg"]
