"""Two forwards on adapted weights: the weights are judged as results, and a difference is called by side and cause."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import trace
from helpers import GATE, K_PROJ, one_line, svf, tensors_of, with_json, with_tensors

from stages.files.bundle import COMPONENTS_FILE, MANIFEST_FILE, OFFSETS_FILE, Bundle, offsets_key
from stages.files.dump import MANIFEST_FILE as DUMP_MANIFEST
from stages.files.tensorfile import sha256
from stages.jobs.decompose import FLOAT64, decompose
from stages.jobs.decompose_options import DecomposeOptions
from stages.jobs.synth import synthesize
from stages.judge.adapted import STAGE, chain_of
from stages.oracle import bounds as noise
from stages.oracle.verdict import measure
from stages.run.adapted import ADAPTED_FILE
from stages.spec.backend import Backend
from stages.spec.layouts import LAYOUTS

pytestmark = pytest.mark.slow

DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def made_in(
    tmp_path_factory: pytest.TempPathFactory, vector: Path, torch_backend: Backend, jax_backend: Backend
) -> Callable[[str], Path]:
    """A folder with `model`, its components `c`, and dumps `torch` and `jax` of it adapted, in one dtype."""
    made: dict[str, Path] = {}

    def make(dtype: str) -> Path:
        if dtype not in made:
            folder = tmp_path_factory.mktemp(dtype)
            synthesize(folder / "model", "tiny", 3, dtype)
            options = DecomposeOptions(str(folder / "model"), vector, None, (2,), folder / "c", None, True)
            decompose(options, FLOAT64, torch_backend)
            for backend in (torch_backend, jax_backend):
                trace(folder / "model", backend, adapted=folder / "c", out=folder / backend.name)
            made[dtype] = folder
        return made[dtype]

    return make


@pytest.fixture
def of(made_in: Callable[[str], Path], request: pytest.FixtureRequest) -> Path:
    return made_in(getattr(request, "param", "float32"))


def relabelled(bundle: Path, layout: str) -> Path:
    """The bundle with every V stored as `layout` has it, and labelled so."""

    def turn(tensors: dict[str, np.ndarray]) -> None:
        for name in tensors:
            if name.startswith("svd.V.") and not LAYOUTS[layout].transposed:
                tensors[name] = np.ascontiguousarray(tensors[name].T)

    with_tensors(bundle / COMPONENTS_FILE, turn)
    label(bundle, layout)
    return bundle


def label(bundle: Path, layout: str) -> None:
    def change(manifest: dict[str, Any]) -> None:
        for item in (manifest, *manifest["selected_tensors"]):
            item["component_v_layout"] = layout

    with_json(bundle / MANIFEST_FILE, change)


def diffed(a: Path, b: Path, *options: object) -> Any:
    return svf("diff", a, b, "--json", *options).json


def weights(document: Any) -> dict[str, dict[str, Any]]:
    return {row["tensor"]: row for row in document["rows"] if row["stage"] == STAGE}


# -- right runs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", DTYPES, indirect=True)
def test_right_adapted_runs_agree_and_their_weights_are_judged(of: Path) -> None:
    document = diffed(of / "torch", of / "jax")
    assert (document["outcome"], document["culprit"]) == ("agree", None)
    rows = weights(document)
    assert len(rows) == 9
    assert {row[side] for row in rows.values() for side in ("verdict_a", "verdict_b")} <= {"exact", "rounding"}
    assert max(row["ratio_a"] for row in rows.values()) <= 1


@pytest.mark.cover(1)
@pytest.mark.parametrize("layout", ["torch_v", "nx", "vh"])
@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_every_declared_layout_agrees_with_the_others(
    of: Path, layout: str, jax_backend: Backend, tmp_path: Path
) -> None:
    bundle = relabelled(Path(shutil.copytree(of / "c", tmp_path / "c")), layout)
    trace(of / "model", jax_backend, adapted=bundle, out=tmp_path / "jax")
    document = diffed(tmp_path / "jax", tmp_path / "jax")
    assert document["outcome"] == "agree"
    # Against a side of the other bundle: the same weights, from other bytes of V.
    assert diffed(of / "torch", tmp_path / "jax")["outcome"] == "agree"


def test_both_backends_in_one_command(of: Path) -> None:
    run = ("forward", of / "model", "--tokens", "3,141,59", "--adapted", of / "c", "--no-production", "--json")
    done = svf(*run)
    assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
    wrong = svf(*run, "--layout", "vh")
    assert wrong.code == 1
    assert "both sides used layout vh; the bundle declares torch_v" in wrong.json["verdict"]


# -- wrong ones -------------------------------------------------------------------------------------------------


@pytest.mark.cover(1)
@pytest.mark.parametrize("letter", ["a", "b"])
@pytest.mark.parametrize("of", DTYPES, indirect=True)
def test_a_wrong_layout_is_named_with_its_side(of: Path, letter: str, jax_backend: Backend, tmp_path: Path) -> None:
    trace(of / "model", jax_backend, adapted=of / "c", layout="vh", out=tmp_path / "vh")
    pair = (tmp_path / "vh", of / "torch") if letter == "a" else (of / "torch", tmp_path / "vh")
    document = diffed(*pair)
    culprit = document["culprit"]
    assert (document["outcome"], culprit["side"], culprit["stage"]) == ("diverged", letter, STAGE)
    assert f"{letter} used layout vh; the bundle declares torch_v" in document["verdict"]
    other = "b" if letter == "a" else "a"
    assert {row[f"verdict_{other}"] for row in weights(document).values()} <= {"exact", "rounding"}
    # What the forward computed from those weights is right.
    assert {row["verdict"] for row in document["rows"] if row["stage"] != STAGE} <= {"exact", "rounding"}


@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_an_audit_judges_the_adapted_weights_too(of: Path, jax_backend: Backend, tmp_path: Path) -> None:
    right = svf("audit", of / "jax", "--json")
    assert (right.code, right.json["outcome"]) == (0, "sound"), right.json["verdict"]
    assert sum(row["stage"] == STAGE for row in right.json["rows"]) == 9
    trace(of / "model", jax_backend, adapted=of / "c", layout="vh", out=tmp_path / "vh")
    wrong = svf("audit", tmp_path / "vh", "--json")
    assert (wrong.code, wrong.json["culprit"]["stage"]) == (1, STAGE)
    assert wrong.json["culprit"]["hint"] == "used layout vh; the bundle declares torch_v"


def rewrite(dump: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """Change the adapted weights that a dump keeps, its sums too."""
    with_tensors(dump / ADAPTED_FILE, change)
    found = {name: sha256(array) for name, array in tensors_of(dump / ADAPTED_FILE).items()}
    with_json(dump / DUMP_MANIFEST, lambda manifest: manifest.update(adapted_sha256=found))
    return dump


def adapted_as(bundle: Path, name: str, change: Callable[[Any], Any]) -> np.ndarray:
    """An adapted weight from changed operands, in float64."""
    with Bundle(bundle) as opened:
        c = opened.load(next(e for e in opened.entries if e.source_name == name))
        chain = change(chain_of(c, c.entry.layout))
        return chain.oracle(0, c.entry.shape[0], np.dtype(np.float32), noise.LAMBDA).value


ONE = np.ones(1)
CAUSES = {
    "offsets not applied": (lambda c: replace(c, scaled=c.top, top=ONE, bottom=ONE), "did not apply the offsets"),
    "not normalized": (lambda c: replace(c, top=ONE, bottom=ONE), "did not normalize"),
    "one other offset": (
        lambda c: replace(c, scaled=c.scaled * np.where(np.arange(c.scaled.size) == 5, np.float32(1.1), np.float32(1))),
        "was adapted with other offsets: U and V are the bundle's, the scaled S is not (most at 5",
    ),
}


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", CAUSES)
@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_a_cause_is_named(of: Path, name: str, tmp_path: Path) -> None:
    change, words = CAUSES[name]
    wrong = adapted_as(of / "c", K_PROJ, change)
    changed = rewrite(
        Path(shutil.copytree(of / "jax", tmp_path / "jax")),
        lambda tensors: tensors.update({K_PROJ: wrong.astype(tensors[K_PROJ].dtype)}),
    )
    row = weights(diffed(of / "torch", changed))[K_PROJ]
    assert (row["verdict"], row["verdict_a"]) == ("bug", weights(diffed(of / "torch", of / "jax"))[K_PROJ]["verdict_a"])
    assert row["hint_b"].startswith(f"b {words}")


def test_a_side_without_the_components_is_named(of: Path, jax_backend: Backend, tmp_path: Path) -> None:
    trace(of / "model", jax_backend, out=tmp_path / "plain")
    document = diffed(of / "torch", tmp_path / "plain")
    assert document["culprit"]["side"] == "b"
    assert "b ran on the model's own weight, without the components" in document["verdict"]


def test_one_element_beyond_the_bound_is_a_bug_and_one_within_is_not(of: Path, tmp_path: Path) -> None:
    with Bundle(of / "c") as bundle:
        c = bundle.load(next(e for e in bundle.entries if e.source_name == GATE))
        oracle = chain_of(c, "torch_v").oracle(0, c.entry.shape[0], np.dtype(np.float32), noise.LAMBDA)
    for times, outcome in ((0.9, "agree"), (1.5, "diverged")):
        moved = (oracle.value[7, 11] + times * oracle.bound[7, 11]).astype(np.float32)

        def move(tensors: dict[str, np.ndarray], value: np.float32 = moved) -> None:
            tensors[GATE][7, 11] = value

        changed = rewrite(Path(shutil.copytree(of / "jax", tmp_path / f"{times}")), move)
        assert weights(diffed(of / "torch", changed))[GATE]["verdict"] == (
            "rounding" if outcome == "agree" else "suspect"
        )


def test_the_bound_covers_the_rounding_of_every_dtype_and_little_more(of: Path) -> None:
    """The reference, rounded at each of its boundaries, lies within it; half a percent does not."""
    with Bundle(of / "c") as bundle:
        for entry in bundle.entries:
            c = bundle.load(entry)
            for dtype in (np.float32, ml_dtypes.bfloat16, np.float16):
                oracle = chain_of(c, entry.layout).oracle(0, entry.shape[0], np.dtype(dtype), noise.LAMBDA)
                assert measure(oracle, oracle.value.astype(np.float32).astype(dtype)).verdict.passes
                assert not measure(oracle, (oracle.value * 1.01).astype(dtype)).verdict.passes


# -- without the bundle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_without_the_bundle_the_sides_are_judged_against_each_other(
    of: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(of / "c", tmp_path / "c"))
    for backend in (torch_backend, jax_backend):
        trace(of / "model", backend, adapted=bundle, out=tmp_path / backend.name)
    trace(of / "model", jax_backend, adapted=bundle, layout="vh", out=tmp_path / "vh")
    away = bundle.rename(tmp_path / "away")
    document = diffed(tmp_path / "torch", tmp_path / "jax")
    assert document["outcome"] == "agree", document["verdict"]
    noted = [row for row in weights(document).values() if not row["byte_match"]]
    assert noted
    assert all(
        "unavailable" in row["note"] and "twice the error that a replay may have" in row["note"] for row in noted
    )
    assert {row["verdict_a"] for row in weights(document).values()} == {None}
    wrong = diffed(tmp_path / "torch", tmp_path / "vh")
    assert (wrong["outcome"], wrong["culprit"]["side"]) == ("diverged", None)
    assert "a used layout torch_v, b vh" in wrong["verdict"]
    named = diffed(tmp_path / "torch", tmp_path / "vh", "--components", away)
    assert (named["culprit"]["side"], named["culprit"]["stage"]) == ("b", STAGE)


def test_sides_of_two_bundles_are_told_by_what_differs(of: Path, jax_backend: Backend, tmp_path: Path) -> None:
    other = Path(shutil.copytree(of / "c", tmp_path / "other"))
    with_tensors(other / OFFSETS_FILE, lambda t: t.update({offsets_key(GATE): t[offsets_key(GATE)] * np.float32(1.5)}))
    with_json(other / MANIFEST_FILE, lambda m: [item.pop("offsets_sha256", None) for item in m["selected_tensors"]])
    trace(of / "model", jax_backend, adapted=other, out=tmp_path / "jax")
    document = diffed(of / "torch", tmp_path / "jax")
    assert document["outcome"] == "diverged"
    assert "the sides were adapted with different offsets" in document["verdict"]
    assert document["culprit"]["tensor"] == GATE
    refused = svf("diff", of / "torch", tmp_path / "jax", "--components", of / "c")
    assert refused.code == 3
    one_line(Exception(refused.error), "other offsets", GATE)


def test_the_model_gone_makes_no_alarm_of_adapted_embeddings(
    vector: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    synthesize(tmp_path / "model", "tiny", 5, "float32")
    options = DecomposeOptions(str(tmp_path / "model"), vector, None, (2,), tmp_path / "c", None, True)
    decompose(options, FLOAT64, torch_backend)
    for backend in (torch_backend, jax_backend):
        trace(tmp_path / "model", backend, adapted=tmp_path / "c", out=tmp_path / backend.name)
    (tmp_path / "model").rename(tmp_path / "away")
    document = diffed(tmp_path / "torch", tmp_path / "jax")
    assert document["outcome"] == "incomplete"
    assert {row["verdict"] for row in document["rows"]} <= {"exact", "rounding", "unjudged"}
    assert {row["verdict"] for row in weights(document).values()} <= {"exact", "rounding"}


def test_adapted_weights_changed_in_a_dump_are_refused_by_their_sum(of: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(of / "jax", tmp_path / "jax"))
    with_tensors(changed / ADAPTED_FILE, lambda t: t.update({GATE: t[GATE] * np.float32(2)}))
    done = svf("diff", of / "torch", changed)
    assert done.code == 3
    one_line(Exception(done.error), ADAPTED_FILE, GATE, "sha256")


# -- what is applied at all -------------------------------------------------------------------------------------


def commands(
    folder: Path, bundle: Path, out: Path, *layout: str, head: Path = Path("none")
) -> list[tuple[object, ...]]:
    """Every command that applies a bundle to a model."""
    model = folder / "model"
    tokens = ("--tokens", "3,141,59", "--backend", "torch")
    return [
        ("apply", bundle, model, "--out", out, *layout),
        ("forward", model, "--adapted", bundle, *tokens, "--no-production", *layout),
        ("route", model, "--adapted", bundle, "--head", head, *tokens, *layout),
    ]


@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_components_of_another_model_are_refused(of: Path, vector: Path, tmp_path: Path) -> None:
    synthesize(tmp_path / "model", "tiny", 9, "float32" if "float32" in of.name else "bfloat16")
    for words in commands(tmp_path, of / "c", tmp_path / "out", head=vector):
        done = svf(*words)
        assert (done.code, done.out) == (3, ""), words[0]
        one_line(Exception(done.error), "model.embed_tokens.weight", "of another model", "relative residual")
    assert not (tmp_path / "out").exists()


def test_components_of_a_model_cast_to_fewer_bits_are_not_another_models(made_in: Callable[[str], Path]) -> None:
    """The same weights rounded to bfloat16: off by more than a decomposition is, by no more than the cast."""
    of = made_in("float32")
    cast = of / "cast"
    shutil.copytree(of / "model", cast / "model", dirs_exist_ok=True)
    with_tensors(
        cast / "model" / "model.safetensors",
        lambda t: t.update({name: a.astype(ml_dtypes.bfloat16) for name, a in t.items()}),
    )
    with_json(cast / "model" / "config.json", lambda config: config.update(dtype="bfloat16"))
    assert svf(*commands(cast, of / "c", cast / "out")[1]).code == 0
    # One element a step away is no cast of these.
    name = "model.layers.2.self_attn.k_proj.weight"

    def step(tensors: dict[str, np.ndarray]) -> None:
        bits = tensors[name].view(np.uint16)
        bits[3, 4] += 2

    with_tensors(cast / "model" / "model.safetensors", step)
    done = svf(*commands(cast, of / "c", cast / "other")[1])
    assert done.code == 3
    one_line(Exception(done.error), name)


@pytest.mark.parametrize("of", ["float32", "bfloat16"], indirect=True)
def test_a_label_that_lies_is_refused_and_the_right_layout_named(of: Path, tmp_path: Path) -> None:
    lie = Path(shutil.copytree(of / "c", tmp_path / "lie"))
    keep = ("model.embed_tokens.weight", K_PROJ)  # square V

    def only_square(manifest: dict[str, Any]) -> None:
        manifest["selected_tensors"] = [i for i in manifest["selected_tensors"] if i["source_name"] in keep]

    with_json(lie / MANIFEST_FILE, only_square)
    label(lie, "vh")
    for words in commands(of, lie, tmp_path / "out")[:2]:
        done = svf(*words)
        assert (done.code, done.out) == (3, ""), words[0]
        one_line(Exception(done.error), str(lie), "declared layout vh", "give --layout torch_v")
    for words in commands(of, lie, tmp_path / "out", "--layout", "torch_v")[:2]:
        done = svf(*words, progress=True)
        assert done.code == 0, done.err
        assert "the bundle's label vh is wrong for model.embed_tokens.weight" in done.err
    honest = svf(*commands(of, of / "c", tmp_path / "honest", "--layout", "torch_v")[1], progress=True)
    assert honest.code == 0
    assert "wrong" not in honest.err


def test_replay_takes_the_right_layout_of_a_bundle_whose_label_lies(made: Path, tmp_path: Path) -> None:
    lie = Path(shutil.copytree(made / "components", tmp_path / "lie"))
    label(lie, "vh")
    for backend in ("torch", "both"):
        done = svf("replay", lie, "--backend", backend, "--layout", "torch_v", "--json")
        assert (done.code, done.json["outcome"]) == (0, "agree"), done.json["verdict"]
    alone = svf("replay", lie, "--backend", "torch", "--layout", "torch_v", "--json")
    assert "says vh, and torch_v gives it back; 9 tensors" in alone.json["verdict"]
    assert set(alone.json["mislabelled"].values()) == {"torch_v"}
    refused = svf("replay", lie, "--backend", "torch")
    assert refused.code == 3
    one_line(Exception(refused.error), "give --layout torch_v")
    honest = svf("replay", made / "components", "--backend", "torch", "--layout", "torch_v", "--json").json
    assert (honest["mislabelled"], honest["outcome"]) == ({}, "agree")


def test_a_wrong_layout_of_a_replay_is_told_with_the_right_one(made: Path) -> None:
    for backend in ("torch", "both"):
        done = svf("replay", made / "components", "--backend", backend, "--layout", "vh", "--json")
        assert done.code == 1
        assert "torch_v is the right layout of V" in done.json["verdict"]
        assert svf("replay", made / "components", "--backend", backend, "--layout", "vh").code == 1
