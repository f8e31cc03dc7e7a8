"""The page in a real browser: `star-dist serve` as people start it, and Debian's Chromium as they would use it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CHROMIUM = shutil.which("chromium")
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
REQUIRED = "STAR_DIST_BROWSER_REQUIRED"  # set by .ci/run, which installs the browser

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("export"),  # where the run is trained
    pytest.mark.skipif(
        CHROMIUM is None and REQUIRED not in os.environ, reason="chromium is not installed (apt-get install chromium)"
    ),
]


@pytest.fixture(scope="module")
def address(exported: Path) -> Iterator[str]:
    """Where a trained model is served."""
    command = [sys.executable, "-m", "star_dist.command", "serve", str(exported), "--port", "0", "--max-pictures", "3"]
    server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found, "the server did not start"
        yield found[0]
    finally:
        server.terminate()
        server.wait(30)


@pytest.fixture
def page(address: str) -> Iterator:
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, f"{REQUIRED} is set but chromium is not installed"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1280, "height": 860})
        page.set_default_timeout(60_000)
        problems: list[str] = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        page.wait_for_function("() => document.title.includes('star-dist') && model")
        yield page
        assert not problems
        browser.close()


def draw(page, prompt: str, **fields: str) -> None:
    for name, value in ({"prompt": prompt} | fields).items():
        page.fill(f"#{name}", value)
    page.click("#draw")


def finished(page, count: int) -> None:
    page.wait_for_function("count => document.querySelectorAll('figcaption a').length === count", arg=count)
    page.wait_for_function("() => !document.querySelector('#draw').disabled")


def test_drawing_downloading_and_history(page, tmp_path: Path) -> None:
    draw(page, "red heart", count="2", seed="5", top_k="3")
    finished(page, 2)
    figures = page.locator("figure")
    scales = page.evaluate("model.scales.length")
    assert figures.count() == 2 and page.locator("figure >> nth=0").locator(".strip button").count() == scales
    assert page.locator("figcaption span").all_text_contents() == ["seed 5", "seed 6"]
    page.wait_for_function("() => document.querySelector('figure > img').naturalWidth === model.resolution")

    with page.expect_download() as download:
        page.locator("figcaption a").nth(1).click()
    assert download.value.suggested_filename == "red-heart-6.png"
    download.value.save_as(tmp_path / "picture.png")
    side = page.evaluate("model.resolution")
    assert Image.open(tmp_path / "picture.png").size == (side, side)

    page.locator(".strip button").first.click()  # the picture after the first scale
    page.wait_for_function("() => document.querySelector('figure > img').src.includes('/scales/0/')")

    draw(page, "<b>blue flag", count="1", seed="1", top_k="7")
    finished(page, 1)
    assert page.locator("#title").text_content() == "<b>blue flag"  # shown, not interpreted
    page.reload()
    entries = page.locator("#history li button")
    entries.nth(1).wait_for()
    assert entries.count() == 2
    entries.nth(1).click()
    finished(page, 2)
    assert page.locator("#title").text_content() == "red heart" and page.input_value("#seed") == "5"
    assert page.input_value("#top_k") == "3"
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    page.click("#forget")
    assert page.locator("#history").is_hidden()


def test_mistakes_are_messages_on_the_page(page) -> None:
    for prompt, fields, said in [
        ("red heart", {"count": "9"}, "9 pictures were asked for, the limit is 3; ask for fewer at a time"),
        (
            "red heart",
            {"seed": "9007199254740993"},
            "Seed may be up to 9007199254740991 on this page, got “9007199254740993”",
        ),
        ("red heart", {"seed": "", "count": "two"}, "Pictures must be a whole number, got “two”"),
        (
            "red heart",
            {"count": "1", "top_k": "1,1"},
            "top_k has 2 values, the model has 4 scales; give one value or 4",
        ),
    ]:
        draw(page, prompt, **fields)
        page.wait_for_function("text => document.querySelector('#error').textContent === text", arg=said)
        assert page.locator("#error").is_visible()
    draw(page, "red heart", top_k="1,1,3,3")
    finished(page, 1)
    assert page.locator("#error").is_hidden()


def test_long_words_and_seeds_fit_the_page(page) -> None:
    draw(page, "x" * 900, count="3", seed="1234567890")
    finished(page, 3)
    assert page.evaluate("document.documentElement.scrollWidth") == page.evaluate("innerWidth")
    assert page.evaluate("[...document.querySelectorAll('figcaption span')].every(s => s.scrollWidth <= s.clientWidth)")


def test_a_page_that_was_opened_too_early_draws_later(page) -> None:
    refusals = []

    def refuse(route) -> None:
        refusals.append(route.request.url)
        route.fulfill(status=503, body="Service Unavailable")

    said = "() => document.querySelector('#error').textContent === 'the server answered 503'"
    page.route("**/api/model", refuse)
    page.reload()
    page.wait_for_function(said)
    page.evaluate("fail('')")
    draw(page, "red heart", count="1", seed="3")
    page.wait_for_function(said)
    assert len(refusals) == 2 and page.locator("#draw").is_enabled()
    page.unroute("**/api/model")
    draw(page, "red heart")
    finished(page, 1)
    assert page.locator("#error").is_hidden()


def test_a_refused_stream_is_asked_for_again(page) -> None:
    """As by a proxy, or uvicorn at its limit of connections; browsers give up then."""
    refused = []

    def refuse_first(route) -> None:
        if refused:
            route.continue_()
        else:
            refused.append(route.request.url)
            route.fulfill(status=503, body="Service Unavailable")

    page.route("**/events", refuse_first)
    draw(page, "red heart", count="1", seed="3")
    finished(page, 1)
    assert refused and page.locator("#error").is_hidden()


def test_enter_draws_but_not_where_it_ends_a_word(page) -> None:
    assert page.input_value("#count") == "3"  # what people would ask for, or the limit
    page.fill("#prompt", "red heart")
    press = """composing => document.getElementById("prompt").dispatchEvent(
        new KeyboardEvent("keydown", {key: "Enter", isComposing: composing}))"""
    page.evaluate(press, True)
    assert page.locator("#draw").is_enabled() and page.locator("figure").count() == 0
    page.evaluate(press, False)
    finished(page, 3)
