"""The declaration: ten stages, wired from front to back, and everything that derives from them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.files.bundle import sample_stage_key, tensor_stage_key
from stages.files.dump import dump_file
from stages.oracle import components as reference
from stages.oracle.bounds import LAMBDA
from stages.run import replay as replay_run
from stages.spec.backend import Backend
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.stage import Pipeline, Stage

ORDER = [
    "source_f32",
    "offsets_f32",
    "scaled_s",
    "normalization",
    "u_scaled",
    "matmul_pre_norm",
    "zero_source_f32",
    "adapted_source_f32",
    "final_f32",
    "final_bf16",
]
# formats.md, "Declared tolerances": max abs, mean abs.
TOLERANCES = {
    "source_f32": (0, 0),
    "offsets_f32": (0, 0),
    "scaled_s": (1e-6, 1e-8),
    "u_scaled": (1e-6, 1e-8),
    "normalization": (1e-6, 1e-6),
    "zero_source_f32": (1e-3, 1e-5),
    "matmul_pre_norm": (1e-3, 1e-5),
    "adapted_source_f32": (1e-3, 1e-5),
    "final_f32": (1e-3, 1e-5),
}


def test_the_original_tools_stages_in_its_order() -> None:
    assert list(REPLAY) == ORDER
    assert len(REPLAY) == 10
    assert [stage.name for stage in REPLAY.values()] == ORDER


def test_nine_stages_are_required_with_the_original_tolerances() -> None:
    required = {name: (s.tolerance.max_abs, s.tolerance.mean_abs) for name, s in REPLAY.items() if s.required}
    assert required == TOLERANCES


def test_every_stage_says_what_it_is() -> None:
    for stage in REPLAY.values():
        assert stage.doc
        assert set(stage.shape.split()) <= {"rows", "cols", "rank", "one"}
        assert stage.noise in LAMBDA
        assert (stage.noise is not Noise.EXACT) == (stage.name in reference.OPERANDS)


def test_only_the_last_stage_is_not_float32() -> None:
    assert {name: s.dtype for name, s in REPLAY.items() if s.dtype != "float32"} == {"final_bf16": "bfloat16"}


def test_dump_keys_derive_from_the_declaration() -> None:
    assert sample_stage_key("scaled_s") == "stage.scaled_s"
    assert tensor_stage_key("a/b c.weight", "scaled_s") == "tensor.a__b__c.weight.scaled_s"
    assert dump_file("model.layers.26.mlp.up_proj.weight") == "layer-26.safetensors"
    assert dump_file("lm_head.weight") == "model.safetensors"


def test_rows_are_chunked_where_the_shape_has_rows() -> None:
    whole = {name for name, stage in REPLAY.items() if not stage.by_rows}
    assert whole == {"offsets_f32", "scaled_s", "normalization"}


def stage(name: str, *inputs: str, params: tuple[str, ...] = ()) -> Stage:
    return Stage(name, inputs=inputs, params=params, shape="rank")


WRONG: dict[str, tuple[Callable[[], Pipeline], str]] = {
    "an input that nobody produces": (lambda: Pipeline("p", (), (stage("b", "a"),)), "'a'"),
    "an input that is produced later": (lambda: Pipeline("p", (), (stage("b", "a"), stage("a"))), "'a'"),
    "an input that is the stage itself": (lambda: Pipeline("p", (), (stage("a", "a"),)), "'a'"),
    "an unknown parameter": (lambda: Pipeline("p", ("s",), (stage("a", params=("u",)),)), "'u'"),
    "the same name twice": (lambda: Pipeline("p", (), (stage("a"), stage("a"))), "twice"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_wiring_is_an_error_at_construction(kind: str) -> None:
    build, word = WRONG[kind]
    with pytest.raises(ValueError, match=word):
        build()


def test_right_wiring_is_none() -> None:
    path = Pipeline("p", ("s",), (stage("a", params=("s",)), stage("b", "a")))
    assert list(path) == ["a", "b"]
    with pytest.raises(KeyError):
        path["c"]


def test_a_backend_that_misses_a_declared_dtype_is_caught(torch_backend: Backend) -> None:
    """`Replayer` checks what a stage returns against what it declares."""

    def wide(offsets_f32: Any, s: Any) -> Any:
        return (s * (1 + offsets_f32)).double()

    parts = {name: getattr(torch_backend, name) for name in ("put", "get", "compile", "facts")}
    narrow = SimpleNamespace(name="narrow", replay={**torch_backend.replay, "scaled_s": wide}, **parts)
    one = np.ones((16, 2), np.float32)
    flat = np.ones(2, np.float32)
    task = replay_run.ReplayTask(
        "w", (16, 2), lambda a, b: one[a:b], flat, np.eye(2, dtype=np.float32), flat, lambda a, b: one[a:b], "torch_v"
    )
    with pytest.raises(TypeError, match="scaled_s gave float64, declared float32"):
        list(replay_run.Replayer(narrow).run(task))
