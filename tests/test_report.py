"""The HTML report: what the page holds, that it is one file and safe with any names, and that figures are true."""

from __future__ import annotations

import base64
import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, change_dump, trace, write_model
from helpers import fresh, one_line, svf
from hypothesis import given, settings
from hypothesis import strategies as st

from cli import load_backend
from stages import demo
from stages.audit import audit
from stages.culprit_data import (
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
from stages.errors import InputError
from stages.jsonio import to_json
from stages.report import document as documents
from stages.report import page as pages
from stages.report.grid import grid
from stages.report.page import embedded_json, render_page
from stages.tensorfile import stored_dtype

# plotly.js 4.8 MB, and what a small run adds to it.
LARGEST_PAGE = 6_000_000
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
        self._inside: list[str] = []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "h1", "h2", "caption", "title"):
            self._inside.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
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
    def figures(self) -> Any:
        (data,) = [text for attrs, text in self.scripts if attrs.get("type") == "application/json"]
        return json.loads(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.elements if name == tag]


def written_by_us(source: str) -> str:
    """The page without plotly.js."""
    from plotly.offline import get_plotlyjs

    return source.replace(get_plotlyjs(), "")


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
    order = ["ffn_silu of layer 1", "Where", "How the error grows", "The culprit: ffn_silu of layer 1"]
    order += ["Beside the stages", "Every stage", "What computed it"]
    where = [next(i for i, head in enumerate(page.heads) if part in head) for part in order]
    assert where == sorted(where)
    count = len(diverged["rows"])
    for words in (f"{count} of {count} stages compared", diverged["command"], f"{count} rows", "◆ culprit"):
        assert words in page.text
    assert "[2, 7]" in page.text  # the worst coordinate


def test_it_is_semantic_html(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == len(page.all("main")) == len(page.all("header")) == 1
    assert len(page.all("caption")) == len(page.all("table")) > 4
    assert all(th.get("scope") in ("row", "col") for th in page.all("th"))
    plots = [div for div in page.all("div") if "data-figure" in div]
    assert {str(div["data-figure"]) for div in plots} == set(page.figures)
    assert all(div["role"] == "img" and div["aria-label"] for div in plots)
    scrolls = [div for div in page.all("div") if div.get("class") == "scroll"]
    assert all(div.get("tabindex") == "0" and div.get("aria-label") for div in scrolls)
    identifiers = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(identifiers) == len(set(identifiers))
    labels = [attrs["aria-labelledby"] for _, attrs in page.elements if "aria-labelledby" in attrs]
    assert set(labels) <= set(identifiers)


def test_the_side_that_is_wrong_is_chosen(diverged: dict[str, Any]) -> None:
    page = Page(render_page(diverged))
    radios = [attrs for attrs in page.all("input") if attrs.get("name") == "side"]
    assert [attrs["value"] for attrs in radios if "checked" in attrs] == ["b"]
    shown = {trace["meta"] for trace in page.figures["heat"]["data"] if trace["visible"]}
    assert shown == {"b"}


def test_the_map_is_the_rows(diverged: dict[str, Any]) -> None:
    """One cell per row; its colour is log10 of the row's own ratio."""
    figures = Page(render_page(diverged)).figures["heat"]
    layout, traces = figures["layout"], [t for t in figures["data"] if t["meta"] == "b"]
    stages, places = layout["xaxis"]["ticktext"], layout["yaxis"]["ticktext"]
    cells = sum(value is not None for t in traces for row in t["z"] for value in row)
    assert cells == len(diverged["rows"])
    wrong = next(row for row in diverged["rows"] if row["key"] == "layers.1.ffn_silu")
    at = places.index("layer 1"), stages.index("ffn_silu")
    assert traces[0]["z"][at[0]][at[1]] == pytest.approx(math.log10(wrong["ratio_b"]))
    (outline,) = layout["shapes"]
    assert (outline["x0"], outline["y0"]) == (at[1] - 0.5, at[0] - 0.5)


@pytest.mark.parametrize(
    ("verdict", "mark"), [("nonfinite", "NaN"), ("missing", "none"), ("extra", "extra"), ("shape", "shape")]
)
def test_what_has_no_ratio_is_marked(diverged: dict[str, Any], verdict: str, mark: str) -> None:
    document = copy.deepcopy(diverged)
    row = next(row for row in document["rows"] if row["key"] == "layers.0.attn_out")
    row.update(verdict=verdict, verdict_b=verdict if verdict == "nonfinite" else None, ratio_b=None)
    row.update(verdict_a=row["verdict_a"] if verdict == "nonfinite" else None, ratio_a=None)
    cell = grid(document["rows"], document["culprit"]).cells["b"]["layer 0", "attn_out"]
    assert (cell.mark, cell.log) == (mark, None)
    odd = [t for t in Page(render_page(document)).figures["heat"]["data"] if t["meta"] == "b"][2]
    assert mark in {text for row in odd["text"] for text in row}


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
    assert page.figures == {}
    assert "No stage was judged here" in page.text


def test_a_replay_shows_tensors_by_stages_and_layouts(made: Path, tmp_path: Path) -> None:
    done = svf("replay", made / "components", "--backend", "reference", "--html", tmp_path / "r.html", "--json")
    assert done.code == 0, done.err
    page = Page((tmp_path / "r.html").read_text())
    tensors = list(dict.fromkeys(row["tensor"] for row in done.json["rows"]))
    assert page.figures["heat"]["layout"]["yaxis"]["ticktext"] == tensors
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
    ours = written_by_us(source)
    assert len(ours) < len(source)
    assert "://" not in ours
    assert "@import" not in ours
    assert "url(" not in ours


def test_only_our_scripts_may_run(diverged: dict[str, Any]) -> None:
    """The content security policy lists the hashes of the scripts that are there, and allows no fetch."""
    page = Page(render_page(diverged))
    policy = next(m["content"] for m in page.all("meta") if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    scripts = [text for attrs, text in page.scripts if attrs.get("type") != "application/json"]
    hashes = {"sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts}
    assert set(re.findall(r"'(sha256-[^']+)'", policy)) == hashes
    assert len(scripts) == 2


def test_the_page_is_no_larger_than_it_must_be(diverged: dict[str, Any]) -> None:
    source = render_page(diverged)
    assert len(source.encode()) < LARGEST_PAGE
    assert len(written_by_us(source).encode()) < 500_000


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
    monkeypatch.setattr(pages, "find_spec", lambda name: None if name == "plotly" else find_spec(name))
    done = svf("diff", "no", "no", "--html", tmp_path / "r.html")
    assert done.code == 2
    one_line(Exception(done.error), "plotly", "pip install 'svf[report]'")
    assert "jinja2" not in done.error


def test_the_demo_does_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.report_file() is not None
    demo.explain({"rows": []})
    assert "svf[report]" not in capsys.readouterr().out
    monkeypatch.setattr(pages, "find_spec", lambda _name: None)
    assert demo.report_file() is None
    demo.explain({"rows": []})
    assert "pip install 'svf[report]'" in capsys.readouterr().out


def test_checkpoints_have_no_report(place: Path, dumps: tuple[Path, Path], tmp_path: Path) -> None:
    done = svf("diff", place / "model", place / "model", "--html", tmp_path / "r.html")
    assert done.code == 2
    assert "checkpoints" in done.error


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
    page, ours = Page(source), written_by_us(source)
    found = [f"<{tag}>" for tag, _ in page.elements if tag in ("img", "a") and _.get("href") != "#verdict"]
    found += [f"on{name}" for _, attrs in page.elements for name in attrs if name.startswith("on")]
    found += ["a script"] * (len(page.scripts) != 3)
    found += [f"U+{ord(c):04X}" for c in set(ours) if not c.isprintable() and c != "\n"]
    labels = json.dumps([f["layout"] for f in page.figures.values()]) if len(page.scripts) == 3 else ""
    return found + ["markup in a label"] * ("<img" in labels or "<script" in labels)


def test_hostile_names_are_text(diverged: dict[str, Any]) -> None:
    source = render_page(hostile(diverged))
    assert harm(source) == []
    assert "\\x1b[31m\\x00" in Page(source).text
    assert "\\u202egnp.exe\\u2028" in Page(source).text
    assert "<img src=x onerror=evil()>" in Page(source).text  # as a person reads it


def test_a_page_that_escapes_nothing_is_found(diverged: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """That the test of hostile names can fail: by either protection left out."""
    with monkeypatch.context() as patch:
        patch.setattr(documents, "shown", lambda text, _limit: str(text))
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
        "import sys, pathlib; from stages.report.page import report; "
        "report(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); "
        "print(sorted({'torch', 'jax', 'pandas'} & set(sys.modules)))"
    )
    done = fresh(code, tmp_path / "r.json", tmp_path / "r.html")
    assert done.stdout.strip() == "[]", done.stderr
