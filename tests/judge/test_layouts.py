"""`svf layouts`: which contraction gives a tensor back is told from values; labels and shapes are not believed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DOWN, EMBED, GATE, K_PROJ, svf, with_json, with_tensors

from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, MANIFEST_FILE, component_keys, tensor_stage_key
from stages.files.selection import safe_key
from stages.judge import arrangements
from stages.spec.layouts import LAYOUTS

Tensors = dict[str, np.ndarray]
K = component_keys(K_PROJ)
SQUARE = "model.layers.2.self_attn.v_proj.weight"


def row(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(r for r in document["tensors"] if r["tensor"] == name)


def relabel(bundle: Path, layout: str, *names: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for entry in manifest["selected_tensors"]:
            if not names or entry["source_name"] in names:
                entry["component_v_layout"] = layout

    with_json(bundle / MANIFEST_FILE, change)


def recompose(bundle: Path, name: str, change: Callable[[Tensors], None]) -> None:
    """Change u, s, v of one tensor, given by those letters."""
    keys = component_keys(name)

    def parts(tensors: Tensors) -> None:
        named = {part: tensors[key] for part, key in keys.items()}
        change(named)
        tensors.update({keys[part]: np.ascontiguousarray(array) for part, array in named.items()})

    with_tensors(bundle / COMPONENTS_FILE, parts)


def turned(part: str) -> Callable[[Tensors], None]:
    return lambda t: t.update({part: t[part].T})


# The law: however V is stored, the layout that stores it so fits, and another contraction misses by its own size.


@pytest.mark.parametrize("stored", LAYOUTS)
@pytest.mark.parametrize("declared", LAYOUTS)
def test_the_layout_of_a_square_v_is_told_from_its_values(bundle: Path, stored: str, declared: str) -> None:
    if not LAYOUTS[stored].transposed:
        recompose(bundle, K_PROJ, turned("v"))
    relabel(bundle, declared, K_PROJ)
    alike = [name for name in LAYOUTS if LAYOUTS[name].transposed == LAYOUTS[stored].transposed]
    done = svf("layouts", bundle, "--json")
    found = row(done.json, K_PROJ)
    assert (found["declared"], found["matches"]) == (declared, alike)
    assert found["ambiguous"] == (len(alike) > 1)
    assert found["fits"] == (declared in alike)
    assert done.code == (0 if declared in alike else 1)
    assert all((found["residuals"][name] < 0.2) == (name in alike) for name in LAYOUTS)
    assert all(found["residuals"][name] > 1e4 for name in LAYOUTS if name not in alike)
    if declared not in alike:
        assert "the label is wrong" in done.json["verdict"]
        assert K_PROJ in done.json["verdict"]
    elif len(alike) > 1:
        assert "contract alike" in found["note"]


def test_a_transpose_label_without_transposed_values_is_not_believed(bundle: Path) -> None:
    """The history: a tensor called transposed was not; a label had been read and no value."""
    relabel(bundle, "vh")
    done = svf("layouts", bundle, "--json")
    assert (done.code, done.json["outcome"]) == (1, "contradicted")
    assert {tuple(r["matches"]) for r in done.json["tensors"]} == {("torch_v",)}
    assert done.json["tensors"][0]["residuals"]["vh"] > 1e4  # square V of a tall tensor
    assert row(done.json, DOWN)["residuals"]["vh"] is None  # does not fit by shape


def test_a_bundle_as_written_agrees_and_the_default_needs_no_argument(made: Path) -> None:
    done = svf("layouts", made / "components", "--json")
    assert (done.code, done.json["outcome"], done.json["schema"]) == (0, "agree", "svf.layouts/1")
    assert [r["matches"] for r in done.json["tensors"]] == [["torch_v"]] * 9
    assert set(row(done.json, GATE)) >= {"tensor", "declared", "matches", "ambiguous", "residuals"}
    text = svf("layouts", made / "components")
    assert text.code == 0
    assert "AGREE" in text.out


def test_the_model_serves_as_source(bundle: Path, model: Path) -> None:
    (bundle / ALL_STAGES_FILE).unlink()
    alone = svf("layouts", bundle, "--json")  # the sample's stages are still there
    assert (alone.code, alone.json["outcome"]) == (5, "incomplete")
    assert sum(r["fits"] is not None for r in alone.json["tensors"]) == 1
    assert svf("layouts", bundle, "--model", model).code == 0


def householder(n: int) -> np.ndarray:
    v = np.random.default_rng(0).standard_normal(n)
    return np.eye(n) - 2 * np.outer(v, v) / (v @ v)


def test_a_symmetric_v_cannot_be_told(bundle: Path) -> None:
    keys, safe = component_keys(K_PROJ), tensor_stage_key(K_PROJ, "source_f32")
    u, s = np.linalg.qr(np.random.default_rng(1).standard_normal((64, 64)))[0], np.geomspace(4, 0.1, 64)
    with_tensors(
        bundle / COMPONENTS_FILE,
        lambda t: t.update(
            {k: a.astype(np.float32) for k, a in zip(keys.values(), (u, s, householder(64)), strict=True)}
        ),
    )
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.update({safe: ((u * s) @ householder(64)).astype(np.float32)}))
    done = svf("layouts", bundle, "--json")
    found = row(done.json, K_PROJ)
    assert (done.code, found["matches"], found["ambiguous"]) == (0, list(LAYOUTS), True)
    assert "cannot tell" in found["note"]


# Other mistakes than the label: what is done to u, s, v -> words of the note.


def swapped(t: Tensors) -> None:
    t["u"], t["v"] = t["v"], t["u"]


def swapped_as_vh(t: Tensors) -> None:
    t["u"], t["v"] = t["v"], t["u"].T


def permuted(t: Tensors) -> None:
    t["s"] = np.roll(t["s"], 1)


def reversed_s(t: Tensors) -> None:
    t["s"] = t["s"][::-1]


def flipped(t: Tensors) -> None:
    t["u"] = t["u"] * np.where(np.arange(64) < 3, -1, 1).astype(np.float32)


def flipped_both(t: Tensors) -> None:
    signs = np.where(np.arange(64) < 3, -1, 1).astype(np.float32)
    t["u"], t["v"] = t["u"] * signs, t["v"] * signs


MISTAKES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "U and V swapped": (swapped, "U and V are swapped"),
    "U and V swapped, V as vh": (swapped_as_vh, "U and V are swapped, V stored as vh"),
    "U transposed": (turned("u"), "U is stored transposed"),
    "S rolled": (permuted, "the singular values are permuted: column 0 of U and V goes with S[1]"),
    "S reversed": (reversed_s, "the singular values are permuted: column 0 of U and V goes with S[63]"),
    "signs of three columns of U": (flipped, "3 pairs of columns have opposite signs"),
    "S doubled": (lambda t: t.update(s=t["s"] * 2), "S is not this tensor's, U and V are"),
    "U of something else": (lambda t: t.update(u=t["u"][::-1]), "are not this tensor's"),
    "a NaN": (lambda t: t.update(s=np.where(np.arange(64) == 3, np.nan, t["s"]).astype(np.float32)), "NaN"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_square_tensor_is_named(bundle: Path, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    recompose(bundle, K_PROJ, change)
    done = svf("layouts", bundle, "--json")
    found = row(done.json, K_PROJ)
    assert (done.code, found["matches"], found["fits"]) == (1, [], False)
    assert words in found["note"], found["note"]
    assert row(done.json, SQUARE)["fits"]


def test_a_sign_flip_of_a_pair_changes_nothing(bundle: Path) -> None:
    recompose(bundle, K_PROJ, flipped_both)
    assert svf("layouts", bundle).code == 0


@pytest.mark.parametrize("name", [GATE, DOWN])
def test_a_transposed_source_and_swapped_factors_are_told_apart_by_shape(bundle: Path, name: str) -> None:
    key = tensor_stage_key(name, "source_f32")
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.update({key: np.ascontiguousarray(t[key].T)}))
    found = row(svf("layouts", bundle, "--json").json, name)
    assert (found["fits"], found["note"]) == (False, "the source is transposed")
    with_tensors(bundle / ALL_STAGES_FILE, lambda t: t.update({key: np.ascontiguousarray(t[key].T)}))
    recompose(bundle, name, swapped)
    found = row(svf("layouts", bundle, "--json").json, name)
    assert (found["fits"], found["note"]) == (False, "U and V are swapped")


def test_chunks_of_rows_give_what_the_whole_gives(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = svf("layouts", made / "components", "--json").json
    monkeypatch.setattr(arrangements, "_CHUNK_BYTES", 8 * 64 * 17)
    parts = svf("layouts", made / "components", "--json").json
    for one, other in zip(whole["tensors"], parts["tensors"], strict=True):
        assert one["matches"] == other["matches"]
        for name, value in one["residuals"].items():
            # Of what fits only the order of summation is left, which a shorter product changes.
            assert value is None or value < 1 or np.isclose(value, other["residuals"][name], rtol=1e-6)
    assert row(parts, EMBED)["shape"] == [512, 64]


def test_a_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    assert svf("layouts", tmp_path / "none").code == 4
    assert svf("layouts", tmp_path).code == 3
    assert safe_key(K_PROJ) in K["u"]
