"""What a person reads in a terminal: numbers that say something, tables that fit, and what a clean verdict rests on."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import MODELS, change_dump, trace, write_model
from helpers import svf
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from stages.commands.backends import load_backend
from stages.errors import InputError
from stages.files.tensorfile import write_tensors
from stages.judge import document as diff
from stages.judge import wording
from stages.judge.audit import audit
from stages.judge.forward_diff import diff_forward
from stages.judge.metrics import walk
from stages.judge.spread import Spread
from stages.show import console as render

# -- numbers in words ------------------------------------------------------------------------------------------


@given(st.floats(-1e6, 1e6, width=32), st.integers(1, 40))
def test_two_values_that_differ_are_told_apart(a: float, steps: int) -> None:
    b = float(np.float32(a) + np.float32(steps) * np.spacing(np.float32(abs(a) + 1e-30)))
    one, other = wording.apart(a, b)
    assert (one != other) == (a != b)
    assert max(len(one), len(other)) < 26


def test_digits_are_no_more_than_needed() -> None:
    assert wording.apart(6.35, 6.35) == ("6.35", "6.35")
    assert wording.apart(6.35123, 6.35137) == ("6.3512", "6.3514")
    assert wording.apart(1.0, 250.0) == ("1", "250")
    assert wording.apart(None, 2.0) == ("-", "2")


@pytest.mark.parametrize(
    ("ratio", "words"),
    [(2.268, "2.27 times the bound"), (9e5, "9e+05 times the bound"), (1e45, "far beyond any rounding"),
     (0.0, None), (None, None), (math.inf, None), (math.nan, None)],
)  # fmt: skip
def test_a_ratio_that_says_nothing_more_is_no_number(ratio: float | None, words: str | None) -> None:
    assert wording.times(ratio) == words
    assert wording.ratio(1.06e37) == "> 1e6"
    assert wording.times(1e7, "precision") == "over a million times the bound"


def test_a_cosine_near_one_is_not_one() -> None:
    assert wording.cosine(1.0) == "1"
    assert wording.cosine(1 - 3e-12) == "1 - 3e-12"
    assert wording.cosine(0.97311) == "0.97311"
    assert wording.cosine(None) == "-"


def test_the_walk_is_from_stage_to_stage_and_begins_anew_with_each_tensor() -> None:
    rows: list[dict[str, Any]] = [
        {"tensor": None, "cosine": 1.0}, {"tensor": None}, {"tensor": None, "cosine": 0.75},
        {"tensor": "w", "cosine": 0.5}, {"tensor": "w", "cosine": 1.0},
    ]  # fmt: skip
    walk(rows)
    assert [row.get("cosine_delta") for row in rows] == [None, None, -0.25, None, 0.5]


# -- where an error lies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize(("shape", "axes"), [((6, 40), "tokens hidden"), ((5, 3, 8), "tokens heads head_dim"),
                                             ((2, 6, 7), "heads queries keys"), ((16,), "half_dim")])  # fmt: skip
def test_spread_is_plain_numpy_and_finds_the_column(dtype: type, shape: tuple[int, ...], axes: str) -> None:
    rng = np.random.default_rng(0)
    value = rng.standard_normal(shape)
    observed, bound = value.astype(np.float32).astype(dtype), np.full(shape, 0.01)
    at = tuple(n - 2 for n in shape)
    observed[(..., at[-1])] += np.asarray(0.5, dtype)
    spread = Spread(axes)
    spread.add(observed, value, bound)
    found, error = spread.result(), observed.astype(np.float64) - value
    assert found["error_rms"] == pytest.approx(np.sqrt(np.mean(error**2)))
    assert found["bound_rms"] == pytest.approx(0.01)
    assert found["worst_column"]["index"][-1] == at[-1]
    token = {"tokens hidden": 0, "tokens heads head_dim": 0, "heads queries keys": 1}.get(axes)
    if token is None:
        assert found["worst_token"] is None
        return
    others = tuple(n for n in range(len(shape)) if n != token)
    by_token = np.sqrt(np.mean((error / bound) ** 2, axis=others))
    assert found["worst_token"]["index"] == [int(by_token.argmax())]
    assert found["worst_token"]["rms_ratio"] == pytest.approx(by_token.max())


@pytest.mark.parametrize("axis", [0, 1])
def test_spread_of_pieces_is_the_wholes(axis: int) -> None:
    rng = np.random.default_rng(1)
    value = rng.standard_normal((30, 20))
    observed, bound = (value + 1e-3 * rng.standard_normal(value.shape)).astype(np.float32), np.abs(value) * 0.01
    whole, pieces = Spread("rows cols"), Spread("rows cols")
    whole.add(observed, value, bound)
    for start, stop in ((0, 7), (7, 15), (15, value.shape[axis])):
        cut = tuple(slice(start, stop) if n == axis else slice(None) for n in (0, 1))
        pieces.add(observed[cut], value[cut], bound[cut], start, axis)
    for name, expected in whole.result().items():
        got = pieces.result()[name]
        if isinstance(expected, dict):
            assert got["index"] == expected["index"]
            assert got["rms_ratio"] == pytest.approx(expected["rms_ratio"])
        else:
            assert got == pytest.approx(expected)


# -- tables ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two forwards; in the second, the embedding's first value and layer 1's ffn_silu are changed."""
    place = tmp_path_factory.mktemp("show")
    model, backend = write_model(place / "model", MODELS["qwen3"], "float32"), load_backend("reference", "cpu")
    for name in ("a", "b"):
        trace(model, backend, out=place / name)

    def plant(tensors: dict[str, np.ndarray]) -> None:
        for layer in (0, 1):
            tensors[f"layers.{layer}.ffn_silu"] *= np.float32(1.5)

    change_dump(place / "b", plant)
    return place


Lines = Callable[[Callable[..., None], Mapping[str, Any], int], list[str]]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    def shown(show: Callable[..., None], document: Mapping[str, Any], width: int) -> list[str]:
        out = io.StringIO()
        monkeypatch.setattr(
            render, "console", lambda: Console(file=out, width=width, force_terminal=True, color_system=None)
        )
        show(document)
        return out.getvalue().splitlines()

    return shown


def columns(found: list[str], first: str = "stage ") -> list[str]:
    return [name.strip() for name in [line for line in found if line.startswith(first)][-1].split("┃")]


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_name_is_cut_and_a_cosine_walker_finds_the_cosine(lines: Lines, place: Path, width: int) -> None:
    document = diff_forward(place / "a", place / "b")
    found = lines(render.diff_document, document, width)
    for stage in {row["stage"] for row in document["rows"]}:
        assert any(line.split("│")[0].strip() == stage for line in found), stage
    assert max(len(line) for line in found if "│" in line) <= width
    assert columns(found)[:5] == ["stage", "verdict", "cosine", "delta", "error / bound"]
    assert ("rms" in columns(found)) == (width > 80)
    assert "…" not in "\n".join(found)


def test_the_first_difference_is_marked_only_where_it_stands(lines: Lines, place: Path) -> None:
    document = diff_forward(place / "a", place / "b")
    assert "First difference in bytes: layers.0.ffn_silu (marked *)" in lines(render.diff_document, document, 160)
    whole = {**document, "rows": [{**row, "byte_match": row["layer"] is not None} for row in document["rows"]]}
    text = "\n".join(lines(render.diff_document, whole, 160))
    assert "First difference in bytes: inv_freq\n" in text
    assert "*" not in text


def test_the_verdict_says_how_far_it_goes(place: Path) -> None:
    verdict = diff_forward(place / "a", place / "b")["verdict"]
    for words in ("b (", "in the same way in 2 of 2 layers", "Top-1 tokens equal at 100% of positions", "KL up to 0"):
        assert words in verdict


def test_what_a_clean_audit_rests_on(lines: Lines, place: Path) -> None:
    document = audit(place / "a")
    found = lines(render.audit_document, document, 160)
    for name in ("error RMS", "bound RMS", "worst token", "worst column"):
        assert name in columns(found)
    row = next(row for row in document["rows"] if row["key"] == "layers.1.ffn_out")
    assert 0 < row["error_rms"] < row["bound_rms"]
    assert "half step" not in "\n".join(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_a_stored_step_is_called_that(lines: Lines, place: Path, dtype: str) -> None:
    """A right result with one element stored the other way of a near tie: 0.99 of its bound, and nothing to see."""
    document = audit(place / "a")
    rows = [
        {**row, "verdict": "rounding", "ratio": 0.99, "dtype": dtype} if row["stage"] == "ffn_out" else row
        for row in document["rows"]
    ]
    found = lines(render.audit_document, {**document, "rows": rows}, 160)
    assert any("0.99 (half step)" in line for line in found)
    assert any(line.startswith("(half step): storing") for line in found)


# -- svf stats -------------------------------------------------------------------------------------------------


def described(values: np.ndarray) -> dict[str, Any]:
    wide = values.astype(np.float64)
    found = {"mean": wide.mean(), "std": wide.std(), "min": wide.min(), "max": wide.max()}
    return {name: pytest.approx(value, rel=1e-9, abs=1e-12) for name, value in found.items()} | {
        "count": values.size,
        "nonfinite": 0,
    }


def test_stats_of_a_dump_a_tree_a_file_and_another_programs_are_numpys(place: Path, tmp_path: Path) -> None:
    from stages.files.forward_dump import ForwardSide

    side = ForwardSide(place / "a")
    expected = {key: described(side.read(p)) for p, key in side.places.items()}
    assert svf("export", place / "a", tmp_path / "tree").code == 0
    own = tmp_path / "own.safetensors"
    write_tensors(own, {key: side.read(p) for p, key in side.places.items()})
    for source in (place / "a", own):
        rows = svf("stats", source, "--json").json["rows"]
        assert {row["key"]: {name: row[name] for name in expected[row["key"]]} for row in rows} == expected
        assert [row["key"] for row in rows][:2] == ["inv_freq", "rope_angle"]  # in execution order
    tree = {row["key"]: row for row in svf("stats", tmp_path / "tree", "--json").json["rows"]}
    key = "layers.1.ffn_out"
    assert {name: tree[key][name] for name in expected[key]} == expected[key]
    (one,) = svf("stats", tmp_path / "tree" / "layer-1" / "ffn_out.bin", "--json").json["rows"]
    assert one == tree[key]
    side.close()


def test_stats_of_a_replay(made: Path) -> None:
    from stages.files.replay_recorded import open_side

    document = svf("stats", made / "components", "--json").json
    assert (document["schema"], document["kind"]) == ("svf.stats/1", "replay")
    with open_side(made / "components") as side:
        for row in document["rows"]:
            key, _, stage = row["key"].removeprefix("tensor.").rpartition(".")
            file, name = side.tensors[key].stages[stage]
            assert {n: row[n] for n in described(file.read(name))} == described(file.read(name))
    text = svf("stats", made / "components").out
    assert "matmul_pre_norm" in text


def test_stats_of_a_bfloat16_dump_say_so_and_count_what_is_not_finite(tmp_path: Path) -> None:
    values = np.array([1, 2, np.nan, np.inf], ml_dtypes.bfloat16)
    write_tensors(tmp_path / "f.safetensors", {"layers.0.ffn_out": values})
    (row,) = svf("stats", tmp_path / "f.safetensors", "--json").json["rows"]
    assert (row["dtype"], row["mean"], row["count"], row["nonfinite"]) == ("bfloat16", 1.5, 4, 2)
    assert "not finite" in svf("stats", tmp_path / "f.safetensors").out


def test_what_has_no_stages_has_no_stats(place: Path, tmp_path: Path) -> None:
    assert svf("stats", tmp_path / "none").code == 4
    assert svf("stats", place / "model").code == 3


# -- the gate on standard deviations ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "code", "passed"), [("0.5:2", 1, True), ("0.9:1.2", 1, False), ("0.999:1.001", 1, False)]
)
def test_the_gate_names_the_first_stage_outside(place: Path, bounds: str, code: int, passed: bool) -> None:
    done = svf("diff", place / "a", place / "b", "--std-ratio", bounds, "--json")
    found = done.json["std_ratio"]
    assert (done.code, done.json["gates"]) == (code, {"std_ratio": passed})
    assert found["checked"] == len(done.json["rows"])
    assert (found["first"] is None) == passed
    if not passed:
        assert found["first"]["key"] == "layers.0.ffn_silu"
        assert found["first"]["std_ratio"] == pytest.approx(1.5)
        text = svf("diff", place / "a", place / "b", "--std-ratio", bounds).out
        assert "--std-ratio: failed, first at ffn_silu of layer 0: the standard deviation of b over a's is 1.5" in text


def test_the_gate_fails_what_would_pass(place: Path, made: Path) -> None:
    """That exit 1 comes of the gate alone: bounds that leave out 1 are refused, so two equal sides always pass."""
    for side in (place / "a", made / "components"):
        done = svf("diff", side, side, "--std-ratio", "1:1", "--json")
        assert (done.code, done.json["gates"]) == (0, {"std_ratio": True})
        assert "--std-ratio: passed" in svf("diff", side, side, "--std-ratio", "0.5:2").out
    rows = [{"key": "k", "layer": None, "tensor": None, "stage": "s", "verdict": "rounding", "std_ratio": 2.5}]
    assert diff.std_ratios(rows, (0.5, 2))["first"]["key"] == "k"
    assert diff.Gates(std_ratio=(0.5, 2)).results(rows) == {"std_ratio": False}
    assert diff.Gates(std_ratio=(0.5, 2)).results([]) == {"std_ratio": False}  # nothing checked is no pass


def test_the_gate_is_refused_where_counts_differ_or_there_are_no_stages(place: Path) -> None:
    rows = [{"key": "layers.0.q_norm", "verdict": "shape", "note": "a has 5, b has 6"}]
    with pytest.raises(InputError, match=r"layers\.0\.q_norm"):
        diff.std_ratios(rows, (0.5, 2))
    for bounds in ("2:3", "0.5", "x:2", "-1:2", "0.5:inf", "nan:2", ":"):
        assert svf("diff", place / "a", place / "b", "--std-ratio", bounds).code == 2
    assert svf("diff", place / "model", place / "model", "--std-ratio", "0.5:2").code == 2
