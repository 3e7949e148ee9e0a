"""Calibration: what is measured, when it may change a bound, and that a faulty backend cannot excuse itself."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bits import keep_bits
from faulty import Faulty
from forward_models import MODELS, trace, write_model
from helpers import svf, with_json

from stages.errors import InputError
from stages.files.dump import MANIFEST_FILE
from stages.jobs import calibrate
from stages.oracle.bounds import LAMBDA, RMS, RMS_FACTOR
from stages.progress import Progress
from stages.run import calibration
from stages.run.calibration import CAP, SAFETY, SHIPPED, Calibration, facts_of, lambdas_of, load, store
from stages.run.replay import Replayer
from stages.spec.backend import Backend
from stages.spec.noise import Noise

FACTS = {"backend": "mine", "cpu": "this one"}
RIGHT = Calibration("2026-11-20", dict.fromkeys(LAMBDA, 0.5), dict.fromkeys(RMS, 0.1))


def seen(**kinds: float) -> Calibration:
    return dataclasses.replace(RIGHT, seen={**RIGHT.seen, **{Noise[name]: value for name, value in kinds.items()}})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVF_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smallest of the cases, which have every kind of stage."""
    monkeypatch.setattr(calibrate, "FORWARDS", (("tiny", 7, 0),))
    monkeypatch.setattr(calibrate, "REPLAYS", ((192, 64, 0),))


# -- what a measurement may change --------------------------------------------------------------------------------


def test_a_backend_that_rounds_as_others_do_is_judged_by_the_shipped_lambdas() -> None:
    assert RIGHT.lambdas == LAMBDA
    assert not RIGHT.faults


def test_a_noisier_kind_gets_the_safety_above_what_was_seen_and_no_other_kind_changes() -> None:
    found = seen(PRODUCT=4.0)
    assert dict(found.lambdas) == {**LAMBDA, Noise.PRODUCT: 4.0 * SAFETY}
    assert not found.faults


def test_nothing_is_ever_judged_more_strictly_than_shipped() -> None:
    assert dataclasses.replace(RIGHT, seen=dict.fromkeys(LAMBDA, 0.0)).lambdas == LAMBDA


@pytest.mark.parametrize("kind", [kind for kind in LAMBDA if kind is not Noise.EXACT])
def test_beyond_the_cap_it_is_a_fault_that_names_the_kind(kind: Noise) -> None:
    most = CAP * LAMBDA[kind] / SAFETY
    assert not seen(**{kind.name: 0.99 * most}).faults
    (fault,) = seen(**{kind.name: 1.01 * most}).faults
    assert fault.startswith(f"{kind.value}: errors reach")


def test_an_exact_stage_has_no_margin() -> None:
    assert not seen(EXACT=1.0).faults
    assert seen(EXACT=1.01).faults


@pytest.mark.parametrize("kind", RMS)
def test_an_rms_beyond_the_limit_is_a_fault_too(kind: Noise) -> None:
    limit = RMS_FACTOR * RMS[kind]
    assert not dataclasses.replace(RIGHT, rms={kind: 0.99 * limit}).faults
    assert dataclasses.replace(RIGHT, rms={kind: 1.01 * limit}).faults


# -- the fact in a dump -------------------------------------------------------------------------------------------


def test_the_fact_says_what_the_dump_is_judged_by() -> None:
    found = seen(PRODUCT=4.0)
    assert "product 4/5" in found.fact
    assert lambdas_of({"calibration": found.fact}, "dump") == found.lambdas
    assert lambdas_of({"calibration": SHIPPED}, "dump") == LAMBDA
    assert lambdas_of({}, "dump") == LAMBDA


@pytest.mark.parametrize(
    "fact",
    [
        "2026-11-20: product 2.1/400",
        "2026-11-20: product 2.1/1",
        "2026-11-20: exact 0/2",
        "2026-11-20: sorcery 1/4",
        "2026-11-20: product",
        "2026-11-20: product 2.1/4e1e1",
        "today: product 2.1/4",
        "2026-11-20",
        "",
    ],
)
def test_a_fact_that_excuses_anything_is_refused(fact: str) -> None:
    with pytest.raises(InputError, match=r"^dump: .*fact 'calibration'|^dump: fact"):
        lambdas_of({"calibration": fact}, "dump")


def test_a_dump_is_judged_by_the_lambdas_it_records(
    cache: Path, tmp_path: Path, torch_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_model(tmp_path / "model", MODELS["qwen3"], "float32")
    trace(model, torch_backend, out=tmp_path / "shipped")
    store({k: v for k, v in facts_of(torch_backend).items() if k != "calibration"}, seen(PRODUCT=6.0))
    trace(model, torch_backend, out=tmp_path / "looser")
    rows = []
    for name in ("shipped", "looser"):
        document = svf("audit", tmp_path / name, "--json").json
        (row,) = [row for row in document["rows"] if row["key"] == "layers.0.ffn_out"]
        rows.append((document["facts"]["calibration"], row["ratio"], row["rms_ratio"]))
    assert rows[0][0] == SHIPPED
    assert "product 6/7.5" in rows[1][0]
    assert rows[1][1] == pytest.approx(rows[0][1] * LAMBDA[Noise.PRODUCT] / 7.5)
    assert rows[1][2] == pytest.approx(rows[0][2] * LAMBDA[Noise.PRODUCT] / 7.5)
    with_json(tmp_path / "looser" / MANIFEST_FILE, lambda m: m["facts"].update(calibration="2026-11-20: product 1/99"))
    refused = svf("audit", tmp_path / "looser")
    assert refused.code == 3
    assert "lambda 99" in refused.error


# -- the cache ----------------------------------------------------------------------------------------------------


def test_a_calibration_is_kept_for_the_very_same_facts_alone(cache: Path) -> None:
    path = store(FACTS, RIGHT)
    assert path is not None
    assert load(FACTS) == RIGHT
    assert load({**FACTS, "threads": "1"}) is None
    assert load({**FACTS, "cpu": "another"}) is None


def test_a_faulty_one_is_not_kept_and_takes_the_older_with_it(cache: Path) -> None:
    store(FACTS, RIGHT)
    assert store(FACTS, seen(PRODUCT=400.0)) is None
    assert load(FACTS) is None


@pytest.mark.parametrize("change", [{"seen": None}, {"seen": {"product": 400.0}}, {"date": 1, "rms": {"magic": 1}}])
def test_a_damaged_file_is_refused(cache: Path, change: Mapping[str, Any]) -> None:
    path = store(FACTS, RIGHT)
    assert path is not None
    with_json(path, lambda document: document.update(change))
    with pytest.raises(InputError, match="delete it"):
        load(FACTS)


# -- the measurement ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_calibrate_measures_every_kind_and_finds_rounding(name: str, cache: Path, small: None) -> None:
    result = svf("calibrate", "--backend", name, "--json")
    assert result.code == 0, result.err
    (found,) = result.json["backends"]
    assert {row["kind"] for row in found["kinds"]} == {kind.value for kind in LAMBDA} - _OF_EXPERTS
    for row in found["kinds"]:
        assert row["seen"] <= row["shipped"], row
        assert row["rms"] is None or row["rms"] <= row["rms_shipped"], row
    assert json.loads(Path(found["file"]).read_text())["facts"]["backend"] == name


# No preset has experts: their shipped lambdas hold on every device.
_OF_EXPERTS = {"sigmoid", "distribution", "choice", "shares", "experts", "combined"}


def _tf32(stage: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """The stage with operands of 10 mantissa bits."""
    import torch

    cut = (torch.from_numpy(keep_bits(a.numpy(), 10)) if a.dtype == torch.float32 else a for a in arguments)
    return stage(*cut, **options)


def _scaled(stage: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return stage(*arguments, **options) * np.float32(1 + 2.0**-20)


FAULTS = {
    "ffn_gate in TF32": ("ffn_gate", _tf32, "product"),
    "matmul_pre_norm in TF32": ("matmul_pre_norm", _tf32, "product"),
    "scores x (1 + 2^-20)": ("attn_scores", _scaled, "scores"),
    "silu x (1 + 2^-20)": ("ffn_silu", _scaled, "silu"),
    "cos x (1 + 2^-20)": ("rope_cos", _scaled, "cos sin"),
    "residual x (1 + 2^-20)": ("post_attn_residual", _scaled, "exact"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_backend_cannot_calibrate_its_fault_away(
    fault: str, cache: Path, small: None, torch_backend: Backend
) -> None:
    stage, change, kind = FAULTS[fault]
    backend = Faulty(torch_backend, stage, lambda inside: functools.partial(change, inside))
    document = calibrate.calibrate_one(backend, Progress(False))  # type: ignore[arg-type]
    (found,) = document["backends"]
    assert document["outcome"] == "faulty"
    assert {text.partition(":")[0] for text in found["faults"]} == {kind}
    assert found["file"] is None
    assert found["fact"] == SHIPPED
    assert not list(cache.rglob("*.json"))


def test_random_replays_are_of_the_declared_shapes(torch_backend: Backend) -> None:
    measured = calibrate.Measured()
    calibrate.measure_replay(Replayer(torch_backend), (64, 192), 0, measured)
    assert set(measured.seen) == {Noise.EXACT, Noise.SUM_RATIO, Noise.PRODUCT}
    assert calibration.limit_seen(Noise.EXACT) == 1
