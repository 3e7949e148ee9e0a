"""docs/recipes.md and `svf stages` say what the rows say; each row is told apart, has a source, and its cost."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest
from helpers import ROOT, fresh, svf

from stages.jobs.stages import declared
from stages.recipes.catalogue import KINDS, forms_of, kind_of
from stages.recipes.listing import form_lines, joined, joined_words, mod_lines, plain
from stages.recipes.recipe import EVERY, Class, Form, Kind

PAGE = (ROOT / "docs" / "recipes.md").read_text()
FLOORS = json.loads((ROOT / "docs" / "floors.json").read_text())["rows"]
SOUND = (Class.PRESCRIBED, Class.EQUIVALENT)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_rows_of_a_kind_are_told_apart(kind: Kind) -> None:
    assert kind.doc
    for dtype in EVERY:
        words = [
            *(plain(form.words) for form in forms_of(kind, dtype, *Class)),
            *map(plain, (m.words for m in kind.mods)),
        ]
        assert len(set(words)) == len(words)


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_who_does_it_is_known_from_somewhere(kind: Kind) -> None:
    """Each name with how it is known: it was run, or its source read."""
    named = [name for form in kind.forms if form.who for name in form.who.split("; ")]
    assert [name for name in named if not re.fullmatch(r"\S.* \((ran|read|read and ran)\)", name)] == []


def sound_rows() -> Iterator[tuple[str, str, Form]]:
    """Kind, dtype and form of each sound row that is asked beside recorded inputs, of kinds that have several."""
    for kind in KINDS.values():
        stored = {stage.dtype for _, stage in declared() if not stage.absent and kind_of(stage) is kind}
        for dtype in EVERY if "model" in stored else stored:
            forms = [form for form in forms_of(kind, dtype, *SOUND) if not form.unseen]
            yield from ((kind.name, dtype, form) for form in forms[1:])


def test_each_sound_row_has_its_measured_cost() -> None:
    """A row that costs more than a factor 2 says who needs it. What misses: benchmarks/floors.py has it measured."""
    found = {(one["kind"], one["dtype"]): one for one in reversed(FLOORS)}
    dear = 0
    for kind, dtype, form in sound_rows():
        one, words = found[kind, dtype], plain(form.words)
        assert words in one["beside"], (kind, dtype, words)
        k = one["beside"][words]
        if k is None or k > one["prescribed"] + 1:
            dear += 1
            assert form.who, (kind, dtype, words)
    assert dear >= 1


def test_floors_are_no_lower_with_more_rows() -> None:
    for one in FLOORS:
        least = one["prescribed"]
        assert least is not None
        assert all(k is None or k >= least for k in one["beside"].values()), one
        assert one["rows"] >= max([least, *one["beside"].values()]), one
        assert abs(one["judged"] - one["rows"]) <= 4, one


@pytest.mark.parametrize(
    ("dtype", "stage"), [("float32", "ffn_silu"), ("bfloat16", "attn_norm"), ("float16", "ffn_out")]
)
def test_the_figures_are_those_of_the_rows(dtype: str, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Measured again, within a factor 2: another machine adds in another order."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from floors import cases, floors, worst

    for of, fault, oracles in cases((dtype,)):
        if of == dtype and fault.stage == stage:
            again = worst([floors(oracle, fault) for oracle in oracles])
            kept = next(one for one in FLOORS if (one["dtype"], one["stage"], one["fault"]) == (of, stage, fault.words))
            for name in ("former", "prescribed", "rows", "judged"):
                assert abs(getattr(again, name) - kept[name]) <= 1, (fault.words, name)
            assert set(again.beside) == set(kept["beside"])


def section(name: str) -> str:
    return PAGE.partition(f"\n## {name}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize("stage", ["attn_norm", "ffn_out", "ffn_silu", "attention", "qkv_bias", "scaled_s"])
def test_a_stage_is_told_as_the_page_tells_it(stage: str) -> None:
    """Every form with its classes and who does it, every other function, and no more."""
    document, printed = svf("stages", stage, "--json").json, svf("stages", stage)
    assert printed.code == 0
    for recipes in document["recipes"]:
        kind, there = KINDS[recipes["kind"]], section(recipes["kind"])
        assert f"`{stage}`" in there
        assert kind.doc in there
        assert kind.doc in printed.out
        found = [re.split(r"(?<!\\)\|", row)[1:-1] for row in there.splitlines() if row.startswith("| ")]
        rows = [[cell.strip().replace("\\|", "|") for cell in row] for row in found]
        table = {row[0]: row[1:] for row in rows[2:]}
        dtypes = rows[0][1:-1]
        lines = joined(form_lines(kind))
        assert len(table) == len(lines) >= 1
        for line in lines:
            assert f"  {line.words}\n" in printed.out
            (cells,) = (cells for words, cells in table.items() if words.partition(" *(")[0] == line.words)
            assert [re.sub(r"\*|,.*", "", cell) for cell in cells[:-1]] == [line.classes.get(d, "-") for d in dtypes]
            assert line.who in cells[-1]
            assert line.who in printed.out
            assert line.usual in printed.out
        told = [line.removeprefix("- ") for line in there.splitlines() if line.startswith("- ")]
        assert told == joined_words(mod_lines(kind))
        assert all(f"  {words}\n" in printed.out for words in told)
        assert [form["words"] for form in recipes["forms"]] == [line.words for line in form_lines(kind)]


def test_of_one_dtype_only_what_holds() -> None:
    document = svf("stages", "attn_norm", "--dtype", "float32", "--json").json
    (recipes,) = document["recipes"]
    assert {tuple(form["classes"]) for form in recipes["forms"]} == {("float32",)}
    words = [form["words"] for form in recipes["forms"]]
    assert "times the weight in float32, rounded once" not in words
    narrow = svf("stages", "attn_norm", "--dtype", "bfloat16", "--json").json["recipes"][0]
    assert "the inverse root rounded to bfloat16 first" in [form["words"] for form in narrow["forms"]]
    assert all("bfloat16" in row["dtypes"] for row in narrow["fewer_bits"])


def test_all_stages_are_listed_and_each_is_told() -> None:
    rows = svf("stages", "--json").json["stages"]
    names = [row["stage"] for row in rows]
    assert len(set(names)) == len(names) > 30
    assert {"ffn_silu", "scaled_s", "router_logits", "adapted_weight"} <= set(names)
    printed = svf("stages").out
    for row in rows:
        assert row["recipes"], row
        assert any(line.startswith(f"{row['stage']} ") and row["doc"] in line for line in printed.splitlines())
        assert svf("stages", row["stage"], "--json").json["stage"] == row["stage"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("fnn_silu",), "no stage 'fnn_silu'; did you mean ffn_silu"),
        (("zzz",), "no stage 'zzz'; 'svf stages' lists them all"),
        (("--dtype", "bfloat16"), "name it: svf stages attn_norm"),
    ],
)
def test_what_is_no_stage_is_refused(words: tuple[str, ...], said: str) -> None:
    done = svf("stages", *words)
    assert done.code == 2
    assert said in done.error
    assert done.out == ""


def test_an_alias_is_the_stage_it_stands_for() -> None:
    assert svf("stages", "layer_output", "--json").json["stage"] == "post_ffn_residual"


def test_it_loads_no_framework() -> None:
    asked = "import cli, sys\ntry:\n    cli.app(['stages', 'ffn_silu', '--json'])\nfinally:\n    "
    loaded = asked + "print(sorted({'torch', 'jax'} & set(sys.modules)))"
    assert fresh(loaded).stdout.splitlines()[-1] == "[]"


def test_rows_that_differ_by_one_number_are_one_line() -> None:
    assert joined_words(["eps 1e-05", "x", "eps 0.001", "eps any number"]) == ["eps 1e-05, 0.001 or any number", "x"]
    assert joined_words(["a 1 b 2", "a 2 b 3"]) == ["a 1 b 2", "a 2 b 3"]
    assert joined_words(["i + 1", "half"]) == ["i + 1", "half"]
