"""The HTML report in headless Chromium: it draws, fetches nothing, fits every width, and works by keyboard.

Skipped where there is no Chromium: `apt-get install chromium` has one, or CHROMIUM names it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from forward_models import MODELS, change_dump, trace, write_model
from test_report import Page, hostile

from cli import load_backend
from stages.forward_diff import diff_forward
from stages.report.page import render_page, write_page

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: the extra dev has it")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
if CHROMIUM is None:
    pytest.skip("no Chromium: apt-get install chromium, or set CHROMIUM", allow_module_level=True)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Two forwards of the specification; in the second, layer 1's ffn_silu has another sign."""
    place = tmp_path_factory.mktemp("browser")
    model, backend = write_model(place / "model", MODELS["qwen3"], "float32"), load_backend("reference", "cpu")
    for name in ("a", "b"):
        trace(model, backend, out=place / name)

    def plant(tensors: dict[str, Any]) -> None:
        tensors["layers.1.ffn_silu"] *= -1

    return diff_forward(place / "a", change_dump(place / "b", plant))


Open = Callable[..., Any]


@pytest.fixture
def show(browser: Any, tmp_path: Path) -> Iterator[Open]:
    """Opens a document's page, and afterwards fails on anything it logged, threw or fetched."""
    bad: list[str] = []
    pages: list[Any] = []

    def opened(document: dict[str, Any], width: int = 1280, scheme: str = "light") -> Any:
        file = tmp_path / f"report-{len(pages)}.html"
        write_page(document, file)
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.on("console", lambda message: bad.append(message.text))
        page.on("pageerror", lambda error: bad.append(str(error)))
        page.on("request", lambda r: bad.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.goto(file.as_uri())
        page.wait_for_selector("html[data-ready]", timeout=60_000)
        pages.append(page)
        return page

    yield opened
    for page in pages:
        page.close()
    assert bad == []


def test_every_figure_is_drawn_and_nothing_is_fetched(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    assert page.locator("[data-figure]").count() == len(Page(render_page(document)).figures) == 5
    assert page.locator("[data-figure] .plot-container").count() == 5
    assert page.locator("[data-figure=heat] .shapelayer path").count() == 1


@pytest.mark.parametrize("width", [400, 1280, 1920])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_page_scrolls_sideways(show: Open, document: dict[str, Any], width: int, scheme: str) -> None:
    page = show(document, width, scheme)
    for details in page.locator("summary").all():
        details.click()
    assert page.evaluate("document.documentElement.scrollWidth") == width
    background, ink = (
        page.evaluate(f"getComputedStyle(document.body).{name}") for name in ("backgroundColor", "color")
    )
    dark = sum(map(int, background[4:-1].split(","))) < sum(map(int, ink[4:-1].split(",")))
    assert dark == (scheme == "dark")
    drawn = page.locator("[data-figure=heat] .xtick text").first.evaluate("e => getComputedStyle(e).fill")
    assert drawn == ink


def test_a_wide_figure_scrolls_in_its_own_box(show: Open, document: dict[str, Any]) -> None:
    page = show(document, 400)
    box = page.locator(".scroll:has([data-figure=heat])")
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")


def test_the_side_is_chosen_by_keyboard(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    shown = (
        "() => [...new Set(document.querySelector('[data-figure=heat]').data.filter(t => t.visible).map(t => t.meta))]"
    )
    assert page.evaluate(shown) == ["b"]
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "side":
            break
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.value") == "a"
    assert page.evaluate(shown) == ["a"]
    assert page.locator("[data-figure=heat] .shapelayer path").count() == 1  # the culprit stays outlined


def test_the_table_of_the_map_opens_by_keyboard(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    page.locator("summary").first.focus()
    assert not page.locator("table.cells").first.is_visible()
    page.keyboard.press("Enter")
    assert page.locator("table.cells").first.is_visible()
    assert "◆" in page.locator("table.cells").nth(2).inner_text()


def test_focus_can_be_seen(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_hostile_names_do_nothing(show: Open, document: dict[str, Any]) -> None:
    page = show(hostile(document), 400)
    assert page.evaluate("typeof evil") == "undefined"
    assert page.locator("img, svg a").count() == 0
    assert page.evaluate("document.documentElement.scrollWidth") == 400
    assert page.locator("h1").inner_text().endswith("\\u2066")


def test_a_script_that_got_in_would_not_run(browser: Any, document: dict[str, Any], tmp_path: Path) -> None:
    """The content security policy, with the escaping taken away by hand."""
    source = render_page(document).replace("</main>", "<script>document.title = 'owned'</script></main>")
    (tmp_path / "r.html").write_text(source)
    page = browser.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    page.wait_for_selector("html[data-ready]", timeout=60_000)
    assert page.title() != "owned"
    page.close()


def test_print_opens_what_is_folded(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    assert len(page.pdf()) > 10_000
    assert page.evaluate("[...document.querySelectorAll('details')].every(d => d.open)")
