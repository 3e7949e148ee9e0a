"""U, S and V that are not the weight's: named with tensor and reason by verify, replay, audit and diff alike."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import K_PROJ, Result, svf
from test_layouts import Tensors, flipped, permuted, recompose, reversed_s, swapped, swapped_as_vh, turned

from stages.files.bundle import BundleEntry
from stages.judge import decomposition
from stages.judge.arrangements import Parts
from stages.judge.decomposition import fault_of, own_faults

RANK = 64


def clipped(t: Tensors) -> None:
    t["s"] = np.minimum(t["s"], t["s"][5])


def cut(t: Tensors) -> None:
    t["s"] = np.where(np.arange(RANK) < 60, t["s"], 0).astype(np.float32)


def unsorted(t: Tensors) -> None:
    """The same product: a pair of columns in another place."""
    order = np.arange(RANK)
    order[[3, 40]] = 40, 3
    t["u"], t["s"], t["v"] = t["u"][:, order], t["s"][order], t["v"][:, order]


def stretched(t: Tensors) -> None:
    """The same product again: U longer, S smaller by as much."""
    scale = np.where(np.arange(RANK) == 7, 2, 1).astype(np.float32)
    t["u"], t["s"] = t["u"] * scale, t["s"] / scale


def shifted_v(t: Tensors) -> None:
    t["v"] = t["v"] + np.float32(1e-3)


def of_another_model(t: Tensors) -> None:
    rng = np.random.default_rng(5)
    for name in "uv":
        t[name] = np.linalg.qr(rng.standard_normal(t[name].shape))[0].astype(np.float32)


# What is done to U, S, V of a square tensor -> words of the reason.
MISTAKES: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "U transposed": (turned("u"), "U is stored transposed"),
    "U and V swapped": (swapped, "the source is transposed, or U and V are swapped"),
    "swapped, V as vh": (swapped_as_vh, "U and V are swapped, V stored as vh"),
    "signs": (flipped, "3 pairs of columns have opposite signs in U and V"),
    "S rolled": (permuted, "the singular values are permuted: column 0"),
    "S reversed": (reversed_s, "the singular values are permuted: column 0"),
    "S doubled": (lambda t: t.update(s=t["s"] * 2), "S is not this tensor's, U and V are: it is 2 times as large"),
    "S clipped": (clipped, "S is not this tensor's, U and V are: it is clipped at"),
    "S cut": (cut, "S is not this tensor's, U and V are: its last 4 are 0"),
    "S unsorted": (unsorted, "S is not descending at index 4"),
    "U stretched": (stretched, "U^T U is not the identity: off by 3 at [7, 7]"),
    "V not orthonormal": (shifted_v, "V^T V is not the identity"),
    "another model's": (of_another_model, "U, S, V are not this tensor's"),
}


def blamed(done: Result, words: str, side: str | None) -> None:
    """The document's culprit is the tensor, for that reason; and its sentence says so."""
    assert done.code == 1, done.err
    culprit = done.json["culprit"]
    assert (culprit["tensor"], culprit["stage"], culprit["verdict"]) == (K_PROJ, "zero_source_f32", "bug")
    assert culprit["side"] == side
    assert words in culprit["hint"], culprit["hint"]
    assert words in done.json["verdict"]
    assert [row["tensor"] for row in done.json["decomposition"]] == [K_PROJ]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_verify_replay_audit_and_diff_name_the_same_reason(bundle: Path, tmp_path: Path, mistake: str) -> None:
    change, words = MISTAKES[mistake]
    recompose(bundle, K_PROJ, change)
    verified = svf("verify", bundle, "--json")
    assert verified.code == 3
    assert any(K_PROJ in line and words in line for line in verified.json["findings"]), verified.json["findings"]
    assert "is the source" not in svf("verify", bundle).out
    done = svf("replay", bundle, "--backend", "torch", "--json", "--out", tmp_path / "dump", "--select", "k_proj")
    blamed(done, words, "b")
    blamed(svf("audit", tmp_path / "dump", "--json"), words, None)
    blamed(svf("diff", tmp_path / "dump", tmp_path / "dump", "--json"), words, "both")
    assert words in svf("audit", tmp_path / "dump").out


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_right_components_of_any_dtype_are_no_one_s_fault(dtype: str, vector: Path, tmp_path: Path) -> None:
    assert svf("synth", tmp_path / "model", "--dtype", dtype).code == 0
    made = svf("decompose", tmp_path / "model", "--vector", vector, "--layers", "2", "--out", tmp_path / "components",
               "--all-selected-tensors", "--decompose-all-selected-if-missing")  # fmt: skip
    assert made.code == 0, made.err
    for method in ("given", "native"):
        done = svf("replay", tmp_path / "components", "--backend", "torch", "--components", method, "--json",
                   "--out", tmp_path / method)  # fmt: skip
        assert (done.code, done.json["decomposition"], done.json["culprit"]) == (0, [], None)
        audited = svf("audit", tmp_path / method, "--json")
        assert (audited.code, audited.json["decomposition"]) == (0, [])
    both = svf("diff", tmp_path / "given", tmp_path / "native", "--json")
    assert both.json["decomposition"] == []


def test_a_layout_that_was_asked_for_is_told_from_components_that_are_wrong(made: Path, tmp_path: Path) -> None:
    done = svf("replay", made / "components", "--backend", "torch", "--layout", "vh", "--select", "k_proj", "--json",
               "--out", tmp_path / "dump")  # fmt: skip
    assert done.code == 1
    assert done.json["culprit"]["stage"] == "matmul_pre_norm"  # the first stage that used it
    assert "torch_v is the right layout of V" in done.json["verdict"]
    assert [row["components"] for row in done.json["decomposition"]] == [False]
    audited = svf("audit", tmp_path / "dump", "--json")
    assert (audited.code, audited.json["culprit"]["tensor"]) == (1, K_PROJ)
    assert "V was contracted as vh, and it is stored as torch_v" in audited.json["culprit"]["hint"]


def test_a_misfit_without_components_still_has_a_culprit(bundle: Path, tmp_path: Path) -> None:
    recompose(bundle, K_PROJ, MISTAKES["S doubled"][0])
    svf("replay", bundle, "--backend", "torch", "--out", tmp_path / "dump", "--select", "k_proj")
    shutil.rmtree(bundle)
    done = svf("audit", tmp_path / "dump", "--json")
    assert (done.code, done.json["culprit"]["tensor"]) == (1, K_PROJ)
    assert "U, S, V are not this tensor's" in done.json["culprit"]["hint"]


def test_changed_components_are_to_blame_and_not_the_stages_recorded_before(bundle: Path) -> None:
    recompose(bundle, K_PROJ, MISTAKES["S doubled"][0])
    blamed(svf("replay", bundle, "--backend", "torch", "--select", "k_proj", "--json"), "2 times as large", "b")
    blamed(svf("audit", bundle, "--json"), "2 times as large", None)


# The test of U, S and V by themselves.


def parts(u: np.ndarray, s: np.ndarray, v: np.ndarray, w: np.ndarray | None = None) -> Parts:
    source = (u * s) @ v.T if w is None else w
    return Parts(u, s, v, lambda start, stop: source[start:stop], (u.shape[0], v.shape[0]))


def weights() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for rows, cols in ((64, 64), (300, 64), (64, 300), (257, 129), (5, 1), (1, 1), (512, 512)):
        w = rng.standard_normal((rows, cols))
        yield w
        u, _, vt = np.linalg.svd(w, full_matrices=False)
        k = min(rows, cols)
        yield (u * np.geomspace(1, 1e-7, k)) @ vt  # as steep as float32 shows
        yield (u * np.where(np.arange(k) < max(1, k // 2), 1.0, 0.0)) @ vt  # one cluster, and rank-deficient
    yield np.eye(64)


@functools.cache
def decompositions() -> list[tuple[str, np.ndarray, Parts]]:
    """Name, float32 weight and parts of every weight by every method, made once."""
    return [(name, w.astype(np.float32), parts(*usv)) for w in weights() for name, *usv in decompositions_of(w)]


def decompositions_of(w: np.ndarray) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray]]:
    import torch

    f32 = w.astype(np.float32)
    for name, (u, s, vt) in {
        "float64, rounded": np.linalg.svd(f32.astype(np.float64), full_matrices=False),
        "float32": np.linalg.svd(f32, full_matrices=False),
    }.items():
        yield name, u.astype(np.float32), s.astype(np.float32), np.ascontiguousarray(vt.T).astype(np.float32)
    yield "torch.svd", *(x.numpy() for x in torch.svd(torch.from_numpy(f32)))


def test_right_decompositions_of_any_kind_have_no_fault() -> None:
    for name, w, own in decompositions():
        found = list(own_faults(own))
        assert found == [], (name, w.shape, found)
        entry = BundleEntry("x", "", w.shape, "torch_v", "", None, None, {})
        assert fault_of(parts(own.u, own.s, own.v, w), entry, "torch_v", fits=True) is None


@pytest.mark.parametrize("size", [64, 257, 512])
def test_an_entry_beyond_its_bound_is_seen_wherever_it_is(size: int) -> None:
    rng = np.random.default_rng(size)
    s = np.geomspace(1, 1e-2, size).astype(np.float32)
    u, v = (np.linalg.qr(rng.standard_normal((size, size)))[0].astype(np.float32) for _ in range(2))
    assert list(own_faults(parts(u, s, v))) == []
    for _ in range(20):
        i, j = (int(n) for n in rng.integers(0, size, 2))
        bad = u.copy()
        # Column i leans towards column j: u_i . u_j is off by so much, or its length when they are one.
        bad[:, i] += np.float32(1.5 * decomposition.orthogonality_bound(size)) * u[:, j]
        (found,) = own_faults(parts(bad, s, v))
        assert "U^T U is not the identity" in found


def test_the_probe_saves_the_product_for_right_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise AssertionError("a right matrix was multiplied out")

    monkeypatch.setattr(decomposition, "_deviation", never)
    for _, _, own in decompositions():
        assert list(own_faults(own)) == []


def test_blocks_of_rows_give_what_the_whole_gives(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    u = np.linalg.qr(rng.standard_normal((300, 64)))[0].astype(np.float32)
    u[:, 3] *= 1.01
    whole = list(own_faults(parts(u, np.ones(64, np.float32), u)))
    monkeypatch.setattr(decomposition, "_BLOCK", 64 * 17)
    assert list(own_faults(parts(u, np.ones(64, np.float32), u))) == whole
    assert "[3, 3]" in whole[0]
