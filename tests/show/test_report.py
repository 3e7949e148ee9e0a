"""The HTML report: what the page holds, that it is one file and safe with any names, and that figures are true."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import math
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, trace, write_model
from helpers import fresh, one_line, svf
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.commands.backends import load_backend
from stages.errors import InputError
from stages.files.jsonio import to_json
from stages.jobs import demo
from stages.judge.audit import audit
from stages.judge.culprit import (
    MAP_COLS,
    MAP_ROWS,
    ORACLE,
    SCATTER_POINTS,
    WORST,
    CulpritData,
    Piece,
    against_oracle,
    chosen_row,
    signed_ulps,
)
from stages.judge.next_steps import closer
from stages.oracle.verdict import Verdict
from stages.show.html import document as documents
from stages.show.html import page as pages
from stages.show.html.figures import histogram, residual_map, scatter
from stages.show.html.grid import Cell, grid
from stages.show.html.page import embedded_json, render_page
from stages.show.html.view import view
from stages.spec.dtypes import stored_dtype

LARGEST_PAGE = 2_000_000  # of 28 layers of 19 stages
LARGEST_FIGURES = 300_000
LARGEST_CULPRIT_DATA = 350_000
HOSTILE = "</script><script>evil()</script>\"'><img src=x onerror=evil()>&lt; \x1b[31m\x00 \u202egnp.exe\u2028\u2066"


class Page(HTMLParser):
    """Elements with their attributes and texts, and the page's words without scripts and styles."""

    def __init__(self, source: str):
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.texts: list[str] = []
        self.heads: list[str] = []
        self.cells: dict[str, dict[int, tuple[set[str], str]]] = {}  # side -> row -> classes and mark of a map's cell
        self._map, self._cell = "", -1
        self._inside: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "h1", "h2", "caption", "title"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        names, row = (dict(attrs).get("class") or "").split(), dict(attrs).get("data-row")
        if "map" in names:
            self._map = names[-1].removeprefix("side-")
        if tag == "td" and row is not None:
            self._cell = int(row)
            self.cells.setdefault(self._map, {})[self._cell] = (set(names), "")

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()
        if tag == "td":
            self._cell = -1

    def handle_data(self, data: str) -> None:
        if self._cell >= 0:
            self.cells[self._map][self._cell] = (self.cells[self._map][self._cell][0], data)
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif not self._inside or self._inside[-1] != "style":
            self.texts.append(data)
            if self._inside and self._inside[-1] in ("h1", "h2"):
                self.heads.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def figures(self) -> set[str]:
        """Names of the figures, each with something drawn in it."""
        assert len(self.all("svg")) >= len(self.all("figure"))
        return {str(attrs["data-figure"]) for attrs in self.all("figure")}

    @property
    def details(self) -> Any:
        (data,) = [text for attrs, text in self.scripts if attrs.get("type") == "application/json"]
        return json.loads(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def dumps(place: Path) -> tuple[Path, Path]:
    """Two forwards of the specification; in the second, one value of layer 1's ffn_silu is wrong."""
    model, backend = write_model(place / "model", MODELS["qwen3"], "float32"), load_backend("reference", "cpu")
    for name in ("a", "b"):
        trace(model, backend, out=place / name)

    def plant(tensors: dict[str, np.ndarray]) -> None:
        tensors["layers.1.ffn_silu"][2, 7] += np.float32(0.5)

    return place / "a", change_dump(place / "b", plant)


@pytest.fixture(scope="module")
def diverged(dumps: tuple[Path, Path]) -> dict[str, Any]:
    return dict(svf("diff", *dumps, "--json").json)


@pytest.fixture(scope="module")
def forward(place: Path, dumps: tuple[Path, Path]) -> dict[str, Any]:
    return trace(place / "model", load_backend("reference", "cpu"))


# What the page holds.


def test_the_page_says_everything_in_order(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    verdict = diverged["verdict"]
    assert page.heads[0] == verdict
    order = ["ffn_silu of layer 1", "Where", "What failed", "The culprit: ffn_silu of layer 1", "How the error grows"]
    order += ["Beside the stages", "Every stage", "What computed it", "For an issue"]
    where = [next(i for i, head in enumerate(page.heads) if part in head) for part in order]
    assert where == sorted(where)
    count = len(diverged["rows"])
    for words in (f"{count} of {count} stages compared", diverged["command"], f"{count} rows", "◆ culprit"):
        assert words in page.text
    failing = sum(row["verdict"] not in ("exact", "rounding") for row in diverged["rows"])
    assert f"{failing} of {count} rows need a look" in page.text
    assert "[2, 7]" in page.text  # the worst coordinate


def test_it_is_semantic_html(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("header")) == 1
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    plots = [svg for svg in page.all("svg") if (svg.get("class") or "").startswith("plot")]
    assert len(plots) == len(page.figures) == 4
    assert all(svg["role"] == "img" and svg["aria-label"] for svg in plots)
    scrolls = [div for div in page.all("div") if (div.get("class") or "").startswith("scroll")]
    assert all(div.get("tabindex") == "0" and div.get("aria-label") for div in scrolls)
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    labels = [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert set(labels) <= set(identifiers)


def test_the_side_that_is_wrong_is_chosen(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    radios = [attrs for attrs in page.all("input") if attrs.get("name") == "side"]
    assert [attrs["value"] for attrs in radios if "checked" in attrs] == ["b"]
    assert set(page.cells) == {"both", "a", "b"}


def test_the_map_is_the_rows(diverged: dict[str, Any]) -> None:
    """One cell per row and side; its shade says on which side of the bound the row's own ratio is."""
    page, rows = Page(render_page(diverged)), diverged["rows"]
    for side, ratio in (("a", "ratio_a"), ("b", "ratio_b")):
        assert page.cells[side].keys() == set(range(len(rows)))
        for at, (classes, mark) in page.cells[side].items():
            shade = next(iter(classes - {"c", "culprit"}))
            if rows[at][ratio]:
                assert shade[0] == ("b" if rows[at][ratio] <= 1 else "o"), rows[at]["key"]
            else:
                assert (shade, mark) in (("calm", "="), ("calm", "?"))
    wrong = next(at for at, row in enumerate(rows) if row["key"] == "layers.1.ffn_silu")
    assert [at for at, (classes, _) in page.cells["b"].items() if "culprit" in classes] == [wrong]
    power = math.floor(math.log10(rows[wrong]["ratio_b"]))
    assert page.cells["b"][wrong][1] == f"+{power}"


@pytest.mark.parametrize(
    ("ratio", "shade", "mark"),
    [(0.002, "b1", "0"), (0.11, "b3", ".11"), (0.6, "b4", ".60"), (0.99, "b5", ".99"), (1.0, "b5", "1.0"),
     (1.04, "o1", "1.0"), (9.9, "o1", "9.9"), (250.0, "o2", "+2"), (1e45, "o3", "+45")],
)  # fmt: skip
def test_rounding_is_blue_up_to_the_bound_and_orange_beyond(ratio: float, shade: str, mark: str) -> None:
    cell = Cell(Verdict.ROUNDING if ratio <= 1 else Verdict.BUG, ratio, 0, culprit=False)
    assert (cell.shade, cell.mark) == (shade, mark)
    style = files("stages.show.html").joinpath("templates", "page.css").read_text()
    red, green, blue = (
        int(n, 16) for n in re.search(rf"^\.{shade}|\.{shade} {{ background: #(..)(..)(..)", style).groups()
    )  # type: ignore[union-attr]
    assert (blue > green > red) == (ratio <= 1)
    assert (red > green > blue) == (ratio > 1)


def test_what_was_run_is_above_the_fold(diverged: dict[str, Any], dumps: tuple[Path, Path]) -> None:
    for document in (diverged, svf("audit", dumps[0], "--json").json):
        head = render_page(document).partition("</header>")[0]
        text = Page(head).text
        for words in ("Model", str(dumps[0].parent / "model"), "float32", "Tokens 5", "reference", "svf", "UTC"):
            assert words in text


def test_a_click_has_what_it_shows(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    assert len(page.details) == len(diverged["rows"])
    wrong = next(at for at, row in enumerate(diverged["rows"]) if row["key"] == "layers.1.ffn_silu")
    found = page.details[wrong]
    assert found["title"] == "ffn_silu of layer 1"
    assert ["at", "[2, 7]"] in found["facts"]
    assert found["worst"][0][0] == "[2, 7]"
    assert found["command"].startswith("svf --no-progress diff ")


def test_the_command_that_looks_closer_is_one(
    diverged: dict[str, Any], dumps: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    row = next(row for row in diverged["rows"] if row["key"] == "layers.1.ffn_silu")
    for document in (diverged, svf("audit", dumps[1], "--json").json):
        done = svf(*shlex.split(closer(document, row, "--html", "closer.html")[0])[2:])
        assert done.code == 1, done.err
        page = Page((tmp_path / "closer.html").read_text())
        assert "The culprit: ffn_silu of layer 1" in page.heads
        assert len(page.details) == 1
        (tmp_path / "closer.html").unlink()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("svf diff a b --html x.html --force --json", "svf diff a b LOOK"),
        ("svf diff 'a b' c --html=x --top 3", "svf diff 'a b' c LOOK"),
        ("svf -q forward M --out T --backend both", "svf diff T/torch T/jax LOOK"),
        ("svf replay C", "svf replay C --out dumps && svf diff dumps/torch dumps/jax LOOK"),
        ("svf diff a b; evil $(evil)", "svf diff a 'b;' evil '$(evil)' LOOK"),
        ("evil diff a b", None), ("svf demo", None), ("svf diff 'a", None), (None, None), (3, None),
    ],
)  # fmt: skip
def test_a_closer_look_starts_from_the_command(command: Any, expected: str | None) -> None:
    sides = {letter: {"facts": {"backend": name}} for letter, name in (("a", "torch"), ("b", "jax"))}
    row = {"stage": "s", "layer": 3, "tensor": None}
    look = "--stages s --layers 3 --top 20 --html closer.html"
    commands = closer({"command": command, **sides}, row, "--html", "closer.html")
    assert " && ".join(commands) == (expected or "").replace("LOOK", look)


def test_the_finding_as_markdown_is_code_alone(diverged: dict[str, Any]) -> None:
    """What comes of a document cannot end its code span, nor be a link or a mention."""
    text = view({**diverged, "verdict": "`` @everyone [x](http://evil) ` <b>"}).markdown
    assert "``` `` @everyone [x](http://evil) ` <b> ```" in text
    assert diverged["command"] in text


@pytest.mark.parametrize(
    ("verdict", "mark"), [("nonfinite", "NaN"), ("missing", "none"), ("extra", "extra"), ("shape", "shape")]
)
def test_what_has_no_ratio_is_marked(diverged: dict[str, Any], verdict: str, mark: str) -> None:
    document = copy.deepcopy(diverged)
    row = next(row for row in document["rows"] if row["key"] == "layers.0.attn_out")
    row.update(verdict=verdict, verdict_b=verdict if verdict == "nonfinite" else None, ratio_b=None)
    row.update(verdict_a=row["verdict_a"] if verdict == "nonfinite" else None, ratio_a=None)
    cell = grid(document["rows"], document["culprit"]).cells["b"]["layer 0", "attn_out"]
    assert (cell.mark, cell.shade, cell.measured) == (mark, "odd", False)
    at = document["rows"].index(row)
    assert Page(render_page(document)).cells["b"][at] == ({"c", "odd"}, mark)


def test_facts_that_differ_are_marked_in_words(diverged: dict[str, Any]) -> None:
    document = copy.deepcopy(diverged)
    document["a"]["facts"]["threads"], document["b"]["facts"]["threads"] = "1", "2"
    page = render_page(document)
    assert page.count("≠ differs") == render_page(diverged).count("≠ differs") + 1


def test_an_audit_has_a_report(dumps: tuple[Path, Path]) -> None:
    page = Page(render_page(audit(dumps[1])))
    assert "The culprit: ffn_silu of layer 1" in page.heads
    assert not page.all("fieldset")  # there is one side
    assert ORACLE in page.text


def test_a_forward_alone_has_a_report(forward: dict[str, Any]) -> None:
    page = Page(render_page(forward))
    assert str(forward["next_token"]) in page.text
    assert page.figures == set()
    assert "No stage was judged here" in page.text


def test_a_forward_alone_has_a_figure(place: Path, tmp_path: Path, dumps: tuple[Path, Path]) -> None:
    out = tmp_path / "f.html"
    done = svf("forward", place / "model", "--backend", "reference", "--tokens", "1,2,3", "--html", out, "--json")
    assert done.code == 0, done.err
    page = Page(out.read_text())
    assert page.figures == {"spread"}
    assert {row["stage"] for row in done.json["stats"]} == set(done.json["stages"])
    assert "Statistics of every stage" in page.text
    assert "spread" in Page(render_page(audit(dumps[0]))).figures


def test_a_replay_shows_tensors_by_stages_and_layouts(made: Path, tmp_path: Path) -> None:
    done = svf("replay", made / "components", "--backend", "reference", "--html", tmp_path / "r.html", "--json")
    assert done.code == 0, done.err
    page = Page((tmp_path / "r.html").read_text())
    tensors = list(dict.fromkeys(row["tensor"] for row in done.json["rows"]))
    assert grid(done.json["rows"], None).places == tuple(tensors)
    assert len(page.cells["both"]) == len(done.json["rows"])
    assert "Layouts of V, by the zero-offset replay" in page.text
    assert done.json["culprit_data"]["key"] == chosen_row(done.json)[0]["key"]
    assert "Largest error / bound" in page.text


def test_the_basis_is_shown_whole(diverged: dict[str, Any]) -> None:
    entry = {"tensor": "w", "ratio": 1.25, "explained": True, "clusters": [{"first": 3, "last": 5, "s": [2.0, 1.0]}]}
    text = Page(render_page({**diverged, "basis": [entry]})).text
    for words in ("Basis of the decomposition", "1.25", "yes", "first 3, last 5, s 2; 1"):
        assert words in text


# One file, from anywhere.


def test_the_page_is_one_file_that_fetches_nothing(diverged: dict[str, Any]) -> None:
    source = render_page(diverged)
    page = Page(source)
    for tag, attrs in page.elements:
        assert tag not in ("link", "img", "iframe", "object", "embed", "form", "base", "video")
        assert "src" not in attrs
        assert attrs.get("href", "#").startswith("#")
        assert not any(name.startswith("on") or name == "style" for name in attrs)
    assert "://" not in source
    assert "@import" not in source
    assert "url(" not in source


def test_only_our_scripts_may_run(diverged: dict[str, Any]) -> None:
    """The content security policy lists the hashes of the scripts that are there, and allows no fetch."""
    page = Page(render_page(diverged))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    scripts = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    hashes = {"sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts}
    assert set(re.findall(r"'(sha256-[^']+)'", policy.partition("script-src")[2])) == hashes
    assert len(scripts) == 1


def test_the_page_is_no_larger_than_it_must_be(diverged: dict[str, Any]) -> None:
    """28 layers of 19 stages, of which half fail, with a culprit as large as a close look gets."""
    layer = [row for row in diverged["rows"] if row["layer"] == 1]
    rows = [{**row, "layer": n, "key": f"layers.{n}.{row['stage']}"} for n in range(28) for row in layer]
    rows = [{**row, "verdict": "bug", "hint_b": "x" * 80} if n % 2 else row for n, row in enumerate(rows)]
    rng = np.random.default_rng(0)
    big = rng.standard_normal((500, 3000)).astype(np.float32)
    close = {
        **look(big, big + rng.standard_normal(big.shape).astype(np.float32), "tokens hidden"),
        "labels": ["a", "b"],
    }
    close |= {"key": "layers.1.ffn_silu", "why": "culprit"}
    source = render_page({**diverged, "rows": rows, "culprit_data": close})
    assert len(source.encode()) < LARGEST_PAGE
    drawn = [residual_map(close), scatter(close), histogram(close)]
    assert sum(len(shape.path) for figure in drawn for shape in figure.shapes) < LARGEST_FIGURES


def test_a_saved_document_gives_the_same_page(dumps: tuple[Path, Path], tmp_path: Path) -> None:
    direct, later, saved = tmp_path / "direct.html", tmp_path / "later.html", tmp_path / "result.json"
    done = svf("diff", *dumps, "--html", direct, "--json")
    assert done.code == 1
    saved.write_text(done.out)
    written = svf("report", saved, "--html", later, "--json")
    assert (written.code, written.err) == (0, "")
    assert written.json["bytes"] == later.stat().st_size
    assert later.read_bytes() == direct.read_bytes()
    assert f"--html {direct}" in done.json["command"]


def test_a_report_of_a_dump_that_is_gone_has_its_figures(diverged: dict[str, Any]) -> None:
    figures = Page(render_page(json.loads(to_json(diverged)))).figures
    assert {"ulp", "scatter", "map"} <= set(figures)
    without = {name: value for name, value in diverged.items() if name != "culprit_data"}
    page = Page(render_page(without))
    assert not {"ulp", "scatter", "map"} & set(page.figures)
    assert "no culprit_data" in page.text


# Refusals, before anything is computed.


@pytest.mark.parametrize("command", [["diff", "no", "no"], ["audit", "no"], ["replay", "no"], ["forward", "no"]])
def test_a_target_that_exists_or_cannot_be_written_is_refused_first(tmp_path: Path, command: list[str]) -> None:
    there = tmp_path / "there.html"
    there.write_text("mine")
    for target in (there, tmp_path / "no folder" / "r.html", tmp_path):
        done = svf(*command, "--html", target)
        assert (done.code, done.out) == (6, "")
        one_line(Exception(done.error), str(target))
    assert there.read_text() == "mine"
    assert svf(*command, "--html", tmp_path / "new.html").code in (2, 3, 4)  # that was not all that is wrong
    assert not (tmp_path / "new.html").exists()


def test_without_the_extra_it_is_refused_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "find_spec", lambda name: None if name == "jinja2" else find_spec(name))
    done = svf("diff", "no", "no", "--html", tmp_path / "r.html")
    assert done.code == 2
    one_line(Exception(done.error), "jinja2", "pip install 'svf[report]'")


def test_the_demo_does_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert not pages.missing_libraries()
    demo.explain({"rows": []}, None)
    assert "svf[report]" not in capsys.readouterr().out
    monkeypatch.setattr(pages, "find_spec", lambda _name: None)
    assert pages.missing_libraries()
    demo.explain({"rows": []}, pages.HOW_TO_GET)
    assert "pip install 'svf[report]'" in capsys.readouterr().out


def test_checkpoints_have_no_report(place: Path, dumps: tuple[Path, Path], tmp_path: Path) -> None:
    done = svf("diff", place / "model", place / "model", "--html", tmp_path / "r.html")
    assert done.code == 2
    assert "checkpoint" in done.error
    assert not (tmp_path / "r.html").exists()


@pytest.mark.parametrize(
    "saved", ['{"schema": "svf.layouts/1"}', "{}", "[]", "nothing", '{"schema": "svf.diff/1"}', '{"schema": 3}']
)
def test_what_is_no_result_is_refused(tmp_path: Path, saved: str) -> None:
    (tmp_path / "r.json").write_text(saved)
    done = svf("report", tmp_path / "r.json", "--html", tmp_path / "r.html")
    assert done.code == 3
    one_line(Exception(done.error), "r.json")
    assert not (tmp_path / "r.html").exists()


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value inside a document."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(path for name, item in inside for path in paths(item, (*at, name)))]


@settings(max_examples=25)
@given(data=st.data())
def test_a_damaged_document_is_a_page_or_a_refusal(small: dict[str, Any], data: st.DataObject) -> None:
    document = copy.deepcopy(small)
    path = data.draw(st.sampled_from([p for p in paths(small) if p and p != ("schema",)]))
    junk = data.draw(st.sampled_from([None, -1, 10**400, 1e308, "x", HOSTILE, [], {}, [[]], True]))
    holder = document
    for step in path[:-1]:
        holder = holder[step]
    holder[path[-1]] = junk
    try:
        page = render_page(document)
    except InputError as error:
        one_line(error, "svf.diff/1")
    else:
        assert "<!doctype html>" in page


@pytest.fixture(scope="module")
def small(diverged: dict[str, Any]) -> dict[str, Any]:
    """The document with a few of its rows."""
    keep = ("embedding", "layers.0.ffn_silu", "layers.1.ffn_silu", "lm_head")
    return {**diverged, "rows": [row for row in diverged["rows"] if row["key"] in keep]}


# Names that mean harm.


def renamed(value: Any, name: str = "") -> Any:
    """The document with a hostile text in every text that is a name and no keyword."""
    keywords = ("schema", "outcome", "verdict", "verdict_a", "verdict_b", "side", "dtype", "axes", "kind", "why", "key")
    if isinstance(value, str):
        return value if name in keywords else value + HOSTILE
    if isinstance(value, dict):
        return {k + (HOSTILE if name == "facts" else ""): renamed(v, k) for k, v in value.items()}
    return [renamed(v, name) for v in value] if isinstance(value, list) else value


def hostile(document: dict[str, Any]) -> dict[str, Any]:
    return {**renamed(document), "verdict": document["verdict"] + HOSTILE}


def harm(source: str) -> list[str]:
    """What a hostile name did to the page, in words; nothing when it was shown as text."""
    page = Page(source)
    found = [f"<{tag}>" for tag, _ in page.elements if tag in ("img", "a") and _.get("href") != "#verdict"]
    found += [f"on{name}" for _, attrs in page.elements for name in attrs if name.startswith("on")]
    found += ["a script"] * (len(page.scripts) != 2)
    found += [f"U+{ord(c):04X}" for c in set(source) if not c.isprintable() and c != "\n"]
    return found


def test_hostile_names_are_text(diverged: dict[str, Any]) -> None:
    source = render_page(hostile(diverged))
    assert harm(source) == []
    assert "\\x1b[31m\\x00" in Page(source).text
    assert "\\u202egnp.exe\\u2028" in Page(source).text
    assert "<img src=x onerror=evil()>" in Page(source).text  # as a person reads it


def test_a_page_that_escapes_nothing_is_found(diverged: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test of hostile names can fail: by either protection left out."""
    with monkeypatch.context() as patch:
        patch.setattr(documents, "all_shown", lambda value: value)
        assert {"U+001B", "U+202E"} <= set(harm(render_page(hostile(diverged))))
    import jinja2

    with monkeypatch.context() as patch:
        patch.setattr(jinja2, "Environment", unescaped(jinja2.Environment))
        assert "<img>" in harm(render_page(hostile(diverged)))


def unescaped(environment: Callable[..., Any]) -> Callable[..., Any]:
    return lambda **options: environment(**{**options, "autoescape": False})


@given(st.text())
def test_embedded_json_is_inert_and_the_same_value(text: str) -> None:
    embedded = embedded_json({"x": text})
    assert json.loads(embedded) == {"x": text}
    assert embedded.isascii()
    assert not set("<>&\u2028\u2029") & set(embedded)


# The close look.

BFLOAT16 = stored_dtype("bfloat16")


@pytest.mark.parametrize("dtype", [np.dtype(np.float32), BFLOAT16])
def test_an_ulp_is_one_step(dtype: np.dtype) -> None:
    x = np.array([-1.5, -1e-30, 0.0, 2.0, 1e30], dtype)
    up = (x.view(f"i{dtype.itemsize}") + np.where(x < 0, -1, 1).astype(f"i{dtype.itemsize}")).view(dtype)
    assert (signed_ulps(x, up) == 1).all()
    assert (signed_ulps(up, x) == -1).all()
    assert (signed_ulps(np.array([0.0], dtype), np.array([-0.0], dtype)) == 0).all()
    tiny = np.array([1], f"i{dtype.itemsize}").view(dtype)
    assert signed_ulps(-tiny, tiny) == 2


def look(a: np.ndarray, b: np.ndarray, axes: str, plan: list[tuple[int, int]] | None = None) -> dict[str, Any]:
    data = CulpritData(a.shape, axes)
    for start, stop in plan or [(0, len(a))]:
        data.add(Piece(a[start:stop], b[start:stop], start))
    return data.result()


def test_every_element_is_counted_once() -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((300, 70)).astype(np.float32)
    b = (a * (1 + 1e-6 * rng.standard_normal(a.shape))).astype(np.float32)
    b[3, 4] = np.nan
    found = look(a, b, "tokens hidden")
    assert sum(x["count"] for x in found["ulp"]) + found["nonfinite"] == a.size
    assert found["nonfinite"] == 1
    for low, high in ((x["from"], x["to"]) for x in found["ulp"]):
        assert low <= high
    ends = [(x["from"], x["to"]) for x in found["ulp"]]
    assert all(one[1] + 1 == other[0] for one, other in itertools.pairwise(ends))
    same = np.count_nonzero(a == b)
    assert next(x["count"] for x in found["ulp"] if x["from"] == x["to"] == 0) == same


def test_pieces_and_the_whole_look_alike() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((150, 300)).astype(np.float32)
    b = (a + 1e-3 * rng.standard_normal(a.shape)).astype(np.float32)
    whole, parts = look(a, b, "rows cols"), look(a, b, "rows cols", [(0, 37), (37, 140), (140, 150)])
    for name in ("ulp", "map", "worst"):
        assert whole[name] == parts[name]
    sideways = CulpritData(a.T.shape, "rows cols")  # as a transposed final stage comes: rows of the weight on axis 1
    for start, stop in ((0, 64), (64, 150)):
        sideways.add(Piece(a[start:stop].T, b[start:stop].T, start, 1))
    assert sideways.result()["map"] == look(a.T, b.T, "rows cols")["map"]


@pytest.mark.parametrize(("shape", "axes"), [((130, 300), "tokens hidden"), ((4, 9, 9), "heads queries keys"),
                                             ((5, 4, 96), "tokens heads head_dim"), ((700,), "rank")])  # fmt: skip
def test_the_map_shows_where_it_differs(shape: tuple[int, ...], axes: str) -> None:
    a = np.ones(shape, np.float32)
    b, at = a.copy(), tuple(n - 2 for n in shape)
    b[at] = -3
    data = look(a, b, axes)
    values = np.array(data["map"]["values"])
    block, of = data["map"]["block"], data["map"]["of"]
    assert math.prod(of) == a.size
    flat = int(np.ravel_multi_index(at, shape))
    cell = (flat // of[1] // block[0], flat % of[1] // block[1])
    assert values[cell] == -4
    assert np.count_nonzero(values) == 1
    assert data["worst"][0]["index"] == list(at)


def test_a_close_look_at_anything_is_small() -> None:
    rng = np.random.default_rng(3)
    a = rng.standard_normal((2_000, 1_100)).astype(np.float32)
    found = look(a, (a * rng.standard_normal(a.shape)).astype(np.float32), "tokens vocab")
    assert len(found["scatter"]["a"]) == len(found["scatter"]["b"]) <= SCATTER_POINTS
    assert len(found["map"]["values"]) <= MAP_ROWS
    assert len(found["map"]["values"][0]) <= MAP_COLS
    assert len(found["worst"]) == WORST
    assert len(to_json(found)) < LARGEST_CULPRIT_DATA


def test_what_is_looked_at(diverged: dict[str, Any]) -> None:
    """The culprit as the sides differ; without one, the largest ratio of all, against what is correctly rounded."""
    row, why = chosen_row(diverged) or ({}, "")
    assert (row["key"], why) == ("layers.1.ffn_silu", "culprit")
    assert against_oracle(row, why) is None
    calm = {**diverged, "culprit": None}
    row, why = chosen_row(calm) or ({}, "")
    ratios = [r for x in diverged["rows"] for r in (x["ratio_a"], x["ratio_b"]) if r]
    assert max(row["ratio_a"], row["ratio_b"]) == max(ratios)
    assert against_oracle(row, why) == "b"
    nothing = [{**x, "ratio_a": 0.0, "ratio_b": 0.0, "rel_l2": 0.0} for x in diverged["rows"]]
    assert chosen_row({"rows": nothing, "culprit": None}) is None


def test_a_page_loads_no_framework(diverged: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(to_json(diverged))
    code = (
        "import sys, pathlib; from stages.show.html.page import report; "
        "report(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); "
        "print(sorted({'torch', 'jax', 'pandas'} & set(sys.modules)))"
    )
    done = fresh(code, tmp_path / "r.json", tmp_path / "r.html")
    assert done.stdout.strip() == "[]", done.stderr
