"""`svf replay --components native`: what each backend decomposes itself is explained by its basis, a fault is not."""

from __future__ import annotations

import ast
import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import DOWN, EMBED, GATE, K_PROJ, ROOT, svf, tensors_of, with_json, with_tensors

from stages.commands.backends import BACKENDS
from stages.files.bundle import ALL_STAGES_FILE, COMPONENTS_FILE, OFFSETS_FILE, Bundle
from stages.files.bundle import MANIFEST_FILE as BUNDLE_MANIFEST
from stages.files.dump import MANIFEST_FILE, keep_hashes
from stages.jobs.replay_one import ReplayCommand, ReplayJob
from svf_torch.backend import TorchBackend

SELECT = ("--select", "gate_proj", "--select", "k_proj", "--select", "down_proj")
EXPLAINED = "two decompositions of one matrix, not a bug"


@pytest.fixture(scope="module")
def torch_bundle(model: Path, vector: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Components by torch.svd: other ones than the float64 reference's."""
    out = tmp_path_factory.mktemp("torch") / "components"
    done = svf("decompose", model, "--vector", vector, "--layers", 2, "--out", out, "--svd", "torch",
               "--all-selected-tensors", "--decompose-all-selected-if-missing")  # fmt: skip
    assert done.code == 0, done.err
    return out


@pytest.fixture(scope="module")
def native(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dump of each backend with components of its own."""
    folder = tmp_path_factory.mktemp("native")
    for name in BACKENDS:
        command = ["replay", made / "components", "--components", "native", "--backend", name, *SELECT]
        done = svf(*command, "--out", folder / name)
        assert done.code == 0, done.err
    return {name: folder / name for name in BACKENDS}


@pytest.fixture
def changed(native: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of torch's native dump, to be damaged."""
    return Path(shutil.copytree(native["torch"], tmp_path / "changed"))


class Faulty(TorchBackend):
    """A backend whose bases of gate_proj are not quite orthonormal, though U S V^T is still the weight."""

    def svd(self, source: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, s, v = super().svd(source)
        if source.shape != (192, 64):
            return u, s, v
        mix = np.eye(s.size) + 1e-3 * np.random.default_rng(0).standard_normal((s.size, s.size))
        other = np.linalg.solve(mix, (s * v).T) / s[:, None]
        return (u @ mix).astype(np.float32), s, other.T.astype(np.float32)


class OtherOffsets(TorchBackend):
    """A backend that scales with offsets a thousandth too large."""

    @property
    def replay(self) -> Any:
        right = super().replay
        return {**right, "scaled_s": lambda offsets, s: right["scaled_s"](offsets * 1.001, s)}


def replayed(backend: TorchBackend, bundle: Path, out: Path) -> dict[str, Any]:
    """The document of a native replay by a backend that no command line knows."""
    options = ReplayCommand(bundle, select=SELECT[1::2], dump="full", out=out, native_components=True)
    with ExitStack() as stack:
        return ReplayJob(options, stack).run(backend).document


# Explained.


@pytest.mark.parametrize("name", BACKENDS)
def test_a_native_decomposition_is_explained_by_its_basis(name: str, made: Path, torch_bundle: Path) -> None:
    given = torch_bundle if name == "reference" else made / "components"  # which the reference decomposed
    done = svf("replay", given, "--components", "native", "--backend", name, *SELECT, "--json")
    assert done.code == 0, done.err
    document = done.json
    assert document["native_components"] is True
    assert {row["tensor"] for row in document["basis"]} == {GATE, K_PROJ, DOWN}
    assert all(row["explained"] and 0 < row["relative"] < 1e-4 for row in document["basis"])
    assert EXPLAINED in document["verdict"]


def test_v_is_kept_in_the_layout_of_the_bundle(bundle: Path, native: dict[str, Path], tmp_path: Path) -> None:
    with_tensors(bundle / COMPONENTS_FILE, lambda t: t.update({k: t[k].T for k in t if k.startswith("svd.V.")}))
    with_json(bundle / BUNDLE_MANIFEST, lambda m: [e.update(component_v_layout="vh") for e in m["selected_tensors"]])
    command = ["replay", bundle, "--components", "native", "--backend", "torch", *SELECT, "--json"]
    done = svf(*command, "--out", tmp_path / "vh")
    assert done.code == 0, done.err
    assert EXPLAINED in done.json["verdict"]
    key = f"svd.V.{DOWN}"
    one, other = (tensors_of(f / "components" / COMPONENTS_FILE)[key] for f in (tmp_path / "vh", native["torch"]))
    np.testing.assert_array_equal(one, other.T)


@pytest.mark.parametrize("words", [(), ("--components", "native")])
def test_the_same_components_have_no_basis_to_explain(words: tuple[str, ...], made: Path) -> None:
    document = svf("replay", made / "components", "--backend", "reference", *SELECT, *words, "--json").json
    assert (document["native_components"], document["basis"]) == (bool(words), [])


def test_native_dumps_of_two_backends_are_explained_through_diff(native: dict[str, Path]) -> None:
    done = svf("diff", native["torch"], native["jax"], "--json")
    assert done.code == 0, done.err
    assert len(done.json["basis"]) == 3
    assert EXPLAINED in done.json["verdict"]


def test_both_decomposes_on_each_side(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--components", "native", "--select", "k_proj", "--json"]
    done = svf(*command, "--out", tmp_path / "out", "--strict-current-python")
    assert done.json["native_components"] is True
    (row,) = done.json["basis"]
    assert (row["tensor"], row["explained"]) == (K_PROJ, True)
    assert done.json["gates"] == {"strict_current_python": False}
    assert done.code == 1
    assert "each side has its own U, S, V" in done.json["verdict"]
    again = svf("diff", tmp_path / "out" / "torch", tmp_path / "out" / "jax", "--json")
    assert (again.code, again.json["basis"]) == (0, done.json["basis"])


# What a dump carries.


@pytest.mark.parametrize("name", BACKENDS)
def test_a_native_dump_is_judged_by_the_components_it_carries(
    name: str, native: dict[str, Path], tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(native[name], tmp_path / "moved"))
    done = svf("audit", moved, "--json")
    assert done.code == 0, done.err
    assert done.json["coverage"] == {"judged": 30, "unjudged": 0, "expected": 30, "given": 0}
    manifest = json.loads((moved / MANIFEST_FILE).read_text())
    assert (manifest["native_components"], manifest["components"]) == (True, "components")
    with Bundle(moved / "components") as bundle:
        assert {e.component_source for e in bundle.entries} == {f"native_{name}_svd"}
        assert [bundle.load(e).sha256() for e in bundle.entries] == [s["sha256"] for s in manifest["selected"]]
        identity = bundle.entries[0].identity
    stages = manifest["tensors"]
    assert identity == {s: stages[f"tensor.{bundle.entries[0].source_name}.{s}"]["sha256"] for s in identity}


def test_components_of_a_dump_are_looked_for_beside_it_first(
    native: dict[str, Path], monkeypatch: pytest.MonkeyPatch, made: Path
) -> None:
    monkeypatch.chdir(made)  # which has a bundle called `components`
    assert svf("audit", native["jax"]).code == 0


@pytest.mark.parametrize("part", ["U", "S", "V"])
def test_components_changed_after_the_run_judge_nothing(part: str, changed: Path, native: dict[str, Path]) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"svd.{part}.{K_PROJ}"].reshape(-1)[7] *= np.float32(1.01)

    with_tensors(changed / "components" / COMPONENTS_FILE, change)
    assert svf("audit", changed).code == 5
    assert svf("diff", changed, native["jax"]).code == 5


def test_a_dump_of_hashes_carries_no_components(made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--components", "native", "--backend", "reference", "--select", "k_proj"]
    assert svf(*command, "--dump", "hash", "--out", tmp_path / "hashes").code == 0
    manifest = json.loads((tmp_path / "hashes" / MANIFEST_FILE).read_text())
    assert (manifest["native_components"], manifest["components"]) == (True, None)
    assert [p.name for p in (tmp_path / "hashes").iterdir()] == [MANIFEST_FILE]


def test_hashes_kept_of_a_dump_name_no_components_of_their_own(native: dict[str, Path], tmp_path: Path) -> None:
    keep_hashes(native["jax"] / MANIFEST_FILE, tmp_path / "hashes")
    manifest = json.loads((tmp_path / "hashes" / MANIFEST_FILE).read_text())
    assert (manifest["native_components"], manifest["components"]) == (True, None)


def test_the_report_lists_native_variants(torch_bundle: Path, tmp_path: Path) -> None:
    command = ["replay", torch_bundle, "--components", "native", "--backend", "jax", *SELECT]
    assert svf(*command, "--report", tmp_path / "r.json").code == 0
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["semantic_python_component_variants"] == report["large_tensor_chunk_checks"] == []
    labels = {v["label"] for v in report["native_elixir_svd_variants"]}
    assert all(label.startswith("native_svd_jax_host_binary_") for label in labels)
    assert len(labels) == len(report["native_elixir_svd_variants"])
    assert all(v["observed_bf16_sha256"] for v in report["native_elixir_svd_variants"])


# Not explained.


def test_bases_that_are_not_orthonormal_are_a_bug(made: Path, native: dict[str, Path], tmp_path: Path) -> None:
    document = replayed(Faulty(), made / "components", tmp_path / "faulty")
    assert document["outcome"] == "diverged"
    assert all(row["verdict"] in ("exact", "rounding") for row in document["rows"])  # every stage by itself is right
    done = svf("diff", native["jax"], tmp_path / "faulty", "--json")
    assert (done.code, done.json["culprit"]["side"], done.json["culprit"]["tensor"]) == (1, "b", GATE)
    assert "U^T U is not the identity" in done.json["culprit"]["hint"]
    (row,) = [row for row in done.json["basis"] if not row["explained"]]
    assert row["tensor"] == GATE
    assert all(fault.startswith("b: ") for fault in row["faults"])
    assert any("columns of U miss being orthonormal" in fault for fault in row["faults"])
    assert "Basis: no explanation" in done.json["verdict"]


def test_other_offsets_are_not_explained_by_the_basis(made: Path, native: dict[str, Path], tmp_path: Path) -> None:
    document = replayed(OtherOffsets(), made / "components", tmp_path / "other")
    assert document["outcome"] == "diverged"
    done = svf("diff", native["jax"], tmp_path / "other", "--json")
    assert done.code == 1
    for found in (document, done.json):
        assert (found["culprit"]["stage"], found["culprit"]["side"]) == ("scaled_s", "b")
        assert [(row["explained"], row["faults"]) for row in found["basis"]] == [(False, [])] * 3


def test_wrong_offsets_in_the_bundle_of_a_dump_judge_nothing_right(changed: Path, native: dict[str, Path]) -> None:
    key = f"svf.scale_offsets.{GATE}"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[key][3] *= np.float32(1.01)

    with_tensors(changed / "components" / OFFSETS_FILE, change)
    done = svf("diff", native["jax"], changed)
    assert done.code == 3
    assert GATE in done.error
    assert "offsets have another sha256 than the manifest says" in done.error


# Refused.


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--layout", "all"), 2, "--layout all"),
        (("--components", "own"), 2, "own"),
    ],
)
def test_what_cannot_be_asked(words: tuple[str, ...], code: int, told: str, made: Path) -> None:
    done = svf("replay", made / "components", "--components", "native", "--backend", "reference", *words)
    assert done.code == code
    assert told in done.error


def test_a_source_with_nan_is_refused_by_name(bundle: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[f"tensor.{EMBED}.source_f32"][400, 5] = np.nan  # beyond the rows that are looked at for the layout

    with_tensors(bundle / ALL_STAGES_FILE, change)
    command = ["replay", bundle, "--components", "native", "--backend", "jax", "--select", EMBED]
    done = svf(*command, "--out", tmp_path / "out")
    assert done.code == 3
    assert f"source of '{EMBED}': NaN or infinity at index [400, 5]" in done.error
    assert not (tmp_path / "out").exists()


# The backends' svd.


@pytest.mark.parametrize("shape", [(48, 48), (160, 48), (48, 160)])
def test_every_backend_gives_u_s_v_in_one_form(backend: Any, shape: tuple[int, int]) -> None:
    w = np.random.default_rng(5).standard_normal(shape).astype(np.float32)
    u, s, v = backend.svd(w)
    assert (u.shape, s.shape, v.shape) == ((shape[0], 48), (48,), (shape[1], 48))
    assert {a.dtype for a in (u, s, v)} == {np.dtype(np.float32)}
    assert (np.diff(s) <= 0).all()
    np.testing.assert_allclose((u * s) @ v.T, w, atol=2e-5)


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_exact_precision_decomposes_natively(name: str, native: dict[str, Path], made: Path, tmp_path: Path) -> None:
    command = ["replay", made / "components", "--components", "native", "--backend", name, *SELECT]
    assert svf(*command, "--precision", "exact", "--out", tmp_path / "exact").code == 0
    exact, plain = (json.loads((f / MANIFEST_FILE).read_text()) for f in (tmp_path / "exact", native[name]))
    assert exact["precision"] == "exact"
    assert exact["selected"] == plain["selected"]


def test_the_twins_of_svd_are_alike() -> None:
    def svd_of(package: str) -> tuple[list[str], str | None]:
        tree = ast.parse((ROOT / package / "svd.py").read_text())
        found = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "svd")
        return [a.arg for a in found.args.args], ast.get_docstring(found)

    assert svd_of("svf_torch") == svd_of("svf_jax")
