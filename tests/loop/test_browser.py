"""The report page in a real browser: headless Chromium, at the width of a phone and of a desk, light and dark.

It needs ``pip install ebft[browser]`` and a Chromium (Debian: ``apt-get install chromium``). Without them it is
skipped, and says so; where ``EBFT_BROWSER`` is set, as in CI, it fails.
"""

import os
import shutil
from importlib.resources import files
from importlib.util import find_spec

import pytest
from test_page import a_page, lines
from test_security import a_summary

from ebft.output.page import report_page

NONE = "no playwright, axe-core or Chromium: the report page is not looked at in a browser"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DEMANDED = bool(os.environ.get("EBFT_BROWSER"))
if not DEMANDED and (CHROMIUM is None or None in map(find_spec, ("playwright", "axe_playwright_python"))):
    pytest.skip(NONE, allow_module_level=True)

VIEWS = [(width, scheme) for width in (390, 1280) for scheme in ("light", "dark")]
LONG = "x" * 300


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    assert CHROMIUM, NONE
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def view(browser, tmp_path):
    """Opens a page; gives it, and what it has asked for."""

    def open_page(html, width, scheme):
        (tmp_path / "report.html").write_text(html, encoding="utf-8")
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.set_default_timeout(20_000)
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto((tmp_path / "report.html").as_uri())
        return page, asked

    return open_page


@pytest.mark.parametrize(("width", "scheme"), VIEWS)
def test_axe_finds_no_fault_and_nothing_runs_over(width, scheme, view):
    page, asked = view(a_page(), width, scheme)
    page.evaluate("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    found = page.evaluate("axe.run()")
    assert [(fault["id"], fault["nodes"][0]["html"]) for fault in found["violations"]] == []
    assert found["passes"]
    assert len([url for url in asked if not url.startswith("data:")]) == 1  # the file itself
    page.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_long_names_do_not_run_over(width, view):
    page, _ = view(report_page(a_summary(f"org/{LONG}", LONG), lines(3)), width, "light")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_letters_in_charts_can_be_read_on_a_phone(view):
    """Labels shrink with their picture: those of 10 points still have 9 pixels where a phone shows 390."""
    page, _ = view(a_page(), 390, "light")
    sizes = page.evaluate(
        "[...document.querySelectorAll('svg text')].map(text =>"
        " parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a)"
    )
    assert sorted(sizes)[len(sizes) // 2] >= 9
    page.close()


def test_the_keyboard_reaches_commands_and_folds(view):
    page, _ = view(a_page(), 1280, "light")
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.tagName"))
    assert {"PRE", "SUMMARY"} <= set(reached)
    page.close()
