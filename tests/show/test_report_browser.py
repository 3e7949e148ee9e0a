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

from stages.commands.backends import load_backend
from stages.judge.forward_diff import diff_forward
from stages.show.html.page import render_page, write_page

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
    assert page.locator("figure").count() == len(Page(render_page(document)).figures) == 4
    for figure in page.locator("figure svg.plot").all():
        box = figure.bounding_box()
        assert box["width"] > 200
        assert box["height"] > 150
    assert page.locator(".map:visible").count() == 1


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
    drawn = page.locator("svg.plot text").first.evaluate("e => getComputedStyle(e).fill")
    assert drawn == ink


def test_a_wide_figure_scrolls_in_its_own_box(show: Open, document: dict[str, Any]) -> None:
    page = show(document, 400)
    box = page.locator(".scroll:has(svg.wide)").first
    assert box.evaluate("e => e.scrollWidth > e.clientWidth")


def test_the_side_is_chosen_by_keyboard(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    assert page.locator(".map.side-b").is_visible()
    for _ in range(10):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "side":
            break
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.value") == "a"
    assert page.locator(".map.side-a").is_visible()
    assert not page.locator(".map.side-b").is_visible()
    assert page.locator(".map.side-a .culprit").count() == 1  # the culprit stays outlined


def test_a_click_and_the_keyboard_show_a_stage(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    page.locator(".map:visible .culprit").click()
    dialog = page.locator("dialog#stage")
    assert "ffn_silu of layer 1" in dialog.inner_text()
    assert "Worst elements" in dialog.inner_text()
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    page.locator(".map:visible .culprit").focus()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert "ffn_up of layer 1" in dialog.inner_text()
    page.keyboard.press("Escape")
    page.locator("table.rows tr[data-row]").first.click()
    assert "ffn_silu of layer 1" in dialog.inner_text()


def deep(document: dict[str, Any], layers: int = 28) -> dict[str, Any]:
    """The document with so many layers, each as layer 1; the culprit in the middle of the last."""
    model = [row for row in document["rows"] if row["layer"] is None]
    rows = [{**row, "layer": n} for n in range(layers) for row in document["rows"] if row["layer"] == 1]
    return {**document, "rows": [*model, *rows], "culprit": {**document["culprit"], "layer": layers - 1}}


def test_on_a_phone_the_culprit_is_in_sight_and_the_page_is_not_endless(show: Open, document: dict[str, Any]) -> None:
    page = show(deep(document), 400)
    place = page.locator(".map:visible .culprit").evaluate(
        "e => { const c = e.getBoundingClientRect(), b = e.closest('.map').getBoundingClientRect();"
        " return [c.left - b.left, b.right - c.right, c.top - b.top, b.bottom - c.bottom]; }"
    )
    assert min(place) >= 0
    page.locator("summary").first.click()  # all 539 rows
    assert page.evaluate("document.documentElement.scrollHeight") < 10_000


def test_the_finding_is_copied_as_markdown(browser: Any, document: dict[str, Any], tmp_path: Path) -> None:
    write_page(document, tmp_path / "r.html")
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    page.locator("#copy").click()
    page.wait_for_function("document.getElementById('copied').textContent !== ''")
    assert page.evaluate("navigator.clipboard.readText()").startswith("**svf: diverged**")
    context.close()


def test_without_javascript_all_is_there_and_it_says_what_is_not(
    browser: Any, document: dict[str, Any], tmp_path: Path
) -> None:
    write_page(document, tmp_path / "r.html")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((tmp_path / "r.html").as_uri())
    assert "Without JavaScript" in page.locator(".note").inner_text()
    assert not page.locator("#copy").is_visible()
    assert page.locator(".map:visible").count() == 1
    page.locator("input[value=a]").check()
    assert page.locator(".map.side-a").is_visible()
    assert page.locator("figure svg.plot").count() == 4
    context.close()


def test_focus_can_be_seen(show: Open, document: dict[str, Any]) -> None:
    page = show(document)
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_hostile_names_do_nothing(show: Open, document: dict[str, Any]) -> None:
    page = show(hostile(document), 400)
    assert page.evaluate("typeof evil") == "undefined"
    assert page.locator("img, svg a").count() == 0
    page.locator("td[data-row]:visible").first.click()
    assert page.locator("dialog img, dialog script").count() == 0
    page.keyboard.press("Escape")
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
