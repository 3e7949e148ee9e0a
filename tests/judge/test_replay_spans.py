"""Component replays of which only some stages were recorded: judged from the nearest, or from U, S, V and offsets."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import GATE, K_PROJ, with_json, with_tensors

from stages.files.bundle import COMPONENTS_FILE, MANIFEST_FILE, Bundle, Components, tensor_stage_key
from stages.files.tensorfile import write_tensors
from stages.judge.audit import audit
from stages.judge.diff import diff_recorded
from stages.oracle.components import _v_transposed
from stages.run.replay import Replayer
from stages.selftest.faults import FAULTS as FAULTS_BY_NAME
from stages.selftest.planted import CompiledStages, Plant, PlantedBackend
from stages.spec.backend import Backend
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask

Arrays = dict[str, np.ndarray]
# A tall tensor and a square one; what V of the other layout would be fits the square one alone.
NAMES = (GATE, K_PROJ)
OTHER = "model.layers.2.self_attn.v_proj.weight"
# Stages that nothing of the components says: they copy what was given, or are no part of the way to the weight.
BESIDE = ("source_f32", "zero_source_f32")


@pytest.fixture(scope="module")
def bundles(made: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The bundle by the layout that its V is stored in."""
    other = Path(shutil.copytree(made / "components", tmp_path_factory.mktemp("layouts") / "vh"))

    def turned(tensors: Arrays) -> None:
        tensors |= {key: np.ascontiguousarray(v.T) for key, v in tensors.items() if key.startswith("svd.V.")}

    with_tensors(other / COMPONENTS_FILE, turned)
    with_json(other / MANIFEST_FILE, lambda m: [e.update(component_v_layout="vh") for e in m["selected_tensors"]])
    return {"torch_v": made / "components", "vh": other}


def replayed(bundle: Path, backend: Backend) -> dict[str, Arrays]:
    """Every stage of both tensors by name, but the source."""
    found = {}
    with Bundle(bundle) as opened:
        for entry in opened.entries:
            if entry.source_name in NAMES:
                c = opened.load(entry)
                source = np.zeros(entry.shape, np.float32)
                given = (c.u, c.s, c.v, c.offsets, lambda a, b, source=source: source[a:b], entry.layout)
                (chunk,) = Replayer(backend).run(ReplayTask(entry.source_name, entry.shape, *given))
                found[entry.source_name] = {k: v for k, v in chunk.values.items() if k != "source_f32"}
    return found


def recorded(folder: Path, tensors: dict[str, Arrays], stages: tuple[str, ...]) -> Path:
    """A stage file of these stages."""
    path = folder / f"{'-'.join(stages)[:60]}-{len(stages)}.safetensors"
    arrays = {tensor_stage_key(name, s): np.ascontiguousarray(t[s]) for name, t in tensors.items() for s in stages}
    write_tensors(path, arrays)
    return path


def audited(path: Path, bundle: Path) -> dict[str, Any]:
    return audit(path, components=bundle)


@pytest.fixture(scope="module", params=["torch", "jax"])
def backend(request: pytest.FixtureRequest) -> Backend:
    made: Backend = request.getfixturevalue(f"{request.param}_backend")
    return made


@pytest.mark.parametrize("layout", ["torch_v", "vh"])
def test_right_replays_are_sound_whatever_was_recorded(
    bundles: dict[str, Path], backend: Backend, layout: str, tmp_path: Path
) -> None:
    bundle = bundles[layout]
    tensors = replayed(bundle, backend)
    names = tuple(name for name in REPLAY if name != "source_f32")
    for stages in (*((name,) for name in names), *(tuple(n for n in names if n != out) for out in names)):
        document = audited(recorded(tmp_path, tensors, stages), bundle)
        assert document["outcome"] == "sound", (stages, document["verdict"])
        assert document["coverage"] == {
            "judged": 2 * len(stages),
            "unjudged": 0,
            "expected": 2 * len(stages),
            "given": 0,
        }
        for row in document["rows"]:
            apart = row["stage"] not in (*BESIDE, "offsets_f32", "scaled_s")
            if len(stages) == 1 and apart:
                assert "scaled_s" in row["through"] or row["stage"] == "normalization"
                assert 0 < row["floor"] < (0.01 if row["stage"] == "final_bf16" else 1e-5)
                assert row["note"].startswith("judged from U") or row["stage"] == "normalization"


def test_without_components_what_is_lacking_is_said(made: Path, torch_backend: Backend, tmp_path: Path) -> None:
    tensors = replayed(made / "components", torch_backend)
    document = audit(recorded(tmp_path, tensors, ("final_bf16",)))
    assert document["outcome"] == "incomplete"
    assert document["rows"][0]["note"] == "not recorded: final_f32; offsets, u, s, v unavailable; give --components"
    known = recorded(tmp_path, tensors, ("adapted_source_f32", "final_bf16"))
    rows = {row["key"]: row for row in audit(known)["rows"]}
    assert rows[tensor_stage_key(GATE, "final_bf16")]["verdict"] == "exact"  # a copy between them blocks nothing


ROUNDINGS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], str]] = {
    "truncated": (
        lambda x: (x.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32),
        "truncated, not rounded to nearest even",
    ),
    "twice": (lambda x: x.astype(np.float16).astype(np.float32), " 10 mantissa bits, float16-like"),
}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_another_rounding_of_the_weight_is_named(
    made: Path, torch_backend: Backend, tmp_path: Path, rounding: str
) -> None:
    twice, said = ROUNDINGS[rounding]
    tensors = replayed(made / "components", torch_backend)
    for arrays in tensors.values():
        arrays["final_bf16"] = twice(arrays["final_f32"]).astype(ml_dtypes.bfloat16)
    alone = audit(recorded(tmp_path, tensors, ("final_bf16",)), components=made / "components")
    after = audit(recorded(tmp_path, tensors, ("final_f32", "final_bf16")), components=made / "components")
    for document in (alone, after):
        assert document["outcome"] == "faulty"
        assert said in document["culprit"]["hint"], document["culprit"]["hint"]


def test_two_replays_that_recorded_other_stages_are_judged_each_by_its_own(
    made: Path, torch_backend: Backend, jax_backend: Backend, tmp_path: Path
) -> None:
    components = made / "components"
    a = recorded(tmp_path, replayed(components, torch_backend), ("matmul_pre_norm", "final_f32"))
    wrong = replayed(components, jax_backend)
    b = recorded(tmp_path, wrong, ("scaled_s", "final_f32", "final_bf16"))
    document = diff_recorded(a, b, components=components)
    assert document["outcome"] == "agree", document["verdict"]
    rows = {row["stage"]: row for row in document["rows"]}
    assert set(rows) == {"scaled_s", "matmul_pre_norm", "final_f32", "final_bf16"}
    assert "a judged from matmul_pre_norm" in rows["final_f32"]["note"]
    assert "b judged from scaled_s" in rows["final_f32"]["note"]
    assert rows["scaled_s"]["note"].startswith("b alone recorded it")
    assert "a alone recorded it" in rows["matmul_pre_norm"]["note"]
    wrong[GATE]["final_f32"] = wrong[GATE]["final_f32"] * np.float32(1.001)
    document = diff_recorded(a, recorded(tmp_path, wrong, ("final_f32",)), components=components)
    culprit = document["culprit"]
    assert (document["outcome"], culprit["stage"], culprit["tensor"]) == ("diverged", "final_f32", GATE)
    row = next(row for row in document["rows"] if row["tensor"] == GATE and row["stage"] == "final_f32")
    assert row["verdict_a"] in ("exact", "rounding")
    assert "every value is 1.001" in row["hint_b"]


Program = Callable[[Components, dict[str, Components]], np.ndarray]


def right(c: Components, _others: Any = None, **wrong: Any) -> np.ndarray:
    """A replay's weight, in float32; `wrong` are steps done otherwise."""
    z, v = wrong.get("z", c.offsets), wrong.get("v", _v_transposed(c.v, c.entry.layout))
    scaled = wrong.get("scaled", c.s * (np.float32(1) + z))
    ratio = wrong.get("ratio", np.sum(c.s) / np.sum(scaled))
    weight: np.ndarray = (c.u() * scaled) @ v * np.float32(ratio)
    return weight


def ratio_of(c: Components) -> np.float32:
    ratio: np.float32 = np.sum(c.s) / np.sum(c.s * (1 + c.offsets))
    return ratio


def in_tf32(x: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(x).view(np.uint32) + 0x1000 & np.uint32(0xFFFFE000)).view(np.float32)


# What a program may do wrong, and what is said of it: where only the square tensor can show it, of that alone.
FAULTS: dict[str, tuple[Program, str]] = {
    "the other layout": (
        lambda c, _: right(c, v=c.v),
        "in matmul_pre_norm, not recorded: V is contracted as nx, vh, the layout says torch_v",
    ),
    "no 1 +": (
        lambda c, _: right(c, scaled=c.s * c.offsets),
        "in scaled_s, not recorded: S * offsets: the 1 + is missing",
    ),
    "S + z": (
        lambda c, _: right(c, scaled=c.s + c.offsets),
        "in scaled_s, not recorded: S + offsets instead of S * (1 + offsets)",
    ),
    "no offsets": (lambda c, _: right(c, z=0 * c.offsets), "in scaled_s, not recorded: the offsets are missing"),
    "no normalization": (lambda c, _: right(c, ratio=1), "the normalization is missing"),
    "upside down": (lambda c, _: right(c, ratio=1 / ratio_of(c)), "the quotient is upside down"),
    "transposed": (lambda c, _: right(c).T, "transposed"),
    "another tensor's offsets": (
        lambda c, others: right(c, z=others[OTHER].offsets),
        f"offsets of {OTHER} in the place of its own",
    ),
    "rows scaled": (
        lambda c, _: (c.u() * (c.s * (1 + c.offsets))[:, None]) @ c.v.T * ratio_of(c),
        "in u_scaled, not recorded: rows of U are scaled, not columns",
    ),
    "TF32 operands": (
        lambda c, _: in_tf32(c.u() * (c.s * (1 + c.offsets))) @ in_tf32(c.v.T) * ratio_of(c),
        "in matmul_pre_norm, not recorded: its operands have 10 mantissa bits",
    ),
    "a hundredth more": (lambda c, _: right(c) * np.float32(1.01), "not recorded: every value is 1.01 times"),
}


@pytest.mark.parametrize("alone", ["final_bf16", "final_f32"])
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_and_named_in_the_stage_on_the_way(made: Path, tmp_path: Path, fault: str, alone: str) -> None:
    program, said = FAULTS[fault]
    with Bundle(made / "components") as opened:
        parts = {entry.source_name: opened.load(entry) for entry in opened.entries}
        weight = program(parts[K_PROJ], parts).astype(np.float32)
    values = weight if alone == "final_f32" else weight.astype(ml_dtypes.bfloat16)
    path = recorded(tmp_path, {K_PROJ: {alone: values}}, (alone,))
    document = audited(path, made / "components")
    assert document["outcome"] == "faulty"
    culprit = document["culprit"]
    assert (culprit["stage"], culprit["tensor"]) == (alone, K_PROJ)
    assert said in culprit["hint"], culprit["hint"]


def test_a_wrong_layout_of_program_and_label_alike_shows_against_the_model(
    bundle: Path, model: Path, tmp_path: Path
) -> None:
    """Neither the source nor the replay without offsets was recorded: U, S and V are asked."""
    with Bundle(bundle) as opened:
        c = opened.load(next(entry for entry in opened.entries if entry.source_name == K_PROJ))
        wrong, fine = right(c, v=c.v), right(c)

    def relabelled(manifest: dict[str, Any]) -> None:
        for entry in manifest["selected_tensors"]:
            entry.update(component_v_layout="vh" if entry["source_name"] == K_PROJ else "torch_v")

    path = recorded(tmp_path, {K_PROJ: {"final_f32": fine}}, ("final_f32",))
    assert audit(path, components=bundle, model=str(model))["outcome"] == "sound"
    with_json(bundle / MANIFEST_FILE, relabelled)
    path = recorded(tmp_path, {K_PROJ: {"final_f32": wrong}}, ("final_f32",))
    assert audit(path, components=bundle)["outcome"] == "sound"  # as it says it is
    document = audit(path, components=bundle, model=str(model))
    assert document["outcome"] == "faulty"
    assert document["culprit"]["hint"] == "the label is wrong: V is stored as torch_v"


PLANTED = [(name, at) for name, fault in FAULTS_BY_NAME.items() if fault.path == "replay" for at in fault.at]


@pytest.mark.parametrize("alone", ["final_f32", "final_bf16"])
@pytest.mark.parametrize(("name", "at"), [(name, at) for name, at in PLANTED if at not in BESIDE])
def test_planted_faults_that_change_the_weight_by_more_than_the_floor_are_found(
    made: Path, torch_backend: Backend, tmp_path: Path, name: str, at: str, alone: str
) -> None:
    """As the self-test plants them, those of a size 64 times as large as a full record shows them."""
    fault = FAULTS_BY_NAME[name]
    plant = Plant(fault, at, 0, 64 * (fault.size or 1), 5)
    planted = PlantedBackend(CompiledStages(torch_backend), plant)
    right, wrong = (replayed(made / "components", one)[K_PROJ] for one in (torch_backend, planted))
    document = audit(recorded(tmp_path, {K_PROJ: wrong}, (alone,)), components=made / "components")
    (row,) = document["rows"]
    x, y = (arrays[alone].astype(np.float64) for arrays in (right, wrong))
    with np.errstate(all="ignore"):
        change = float(np.linalg.norm(y - x) / np.linalg.norm(x))
    assert planted.changed
    if not change <= row["floor"]:
        assert document["outcome"] == "faulty", (change, row["floor"])
    if fault.must and document["outcome"] == "faulty":
        assert re.search(fault.says or "", document["culprit"]["hint"]), document["culprit"]["hint"]
