"""Laws across the three backends: bits in and out, twin files, every stage against the oracle, layouts, signs."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from helpers import ROOT, one_line
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import factors, make_offsets, task_of, whole

from stages.commands.backends import BACKENDS, load_backend
from stages.errors import InputError, UsageError
from stages.judge.metrics import same_bits
from stages.oracle import components as reference
from stages.oracle.verdict import Verdict, consult, judge
from stages.run.replay import Replayer
from stages.spec.backend import Backend
from stages.spec.dtypes import stored_dtype
from stages.spec.layouts import LAYOUTS, layout_named
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask

# Put and get.

BITS32 = np.uint32([0, 0x80000000, 1, 0x807FFFFF, 0x7FC00001, 0x7F800001, 0xFFC12345, 0x7F800000, 0x3F800000])
BITS16 = np.uint16([0, 0x8000, 1, 0x807F, 0x7FC1, 0x7F81, 0xFFFF, 0x7F80, 0x3F80])


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


ARRAYS: dict[str, Callable[[], np.ndarray]] = {
    "float32, every kind of number": lambda: BITS32.view(np.float32),
    "bfloat16, every kind of number": lambda: BITS16.view(ml_dtypes.bfloat16),
    "every bfloat16": lambda: np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16),
    "transposed": lambda: np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "transposed bfloat16": lambda: np.arange(12).astype(ml_dtypes.bfloat16).reshape(3, 4).T,
    "every second element": lambda: np.arange(12, dtype=np.float32)[::2],
    "reversed": lambda: np.arange(12, dtype=np.float32)[::-1],
    "read-only": lambda: read_only(np.arange(5, dtype=np.float32)),
    "read-only bfloat16": lambda: read_only(np.arange(5).astype(ml_dtypes.bfloat16)),
    "empty": lambda: np.empty((0, 3), np.float32),
    "one": lambda: np.float32([[7]]),
    "no axes": lambda: np.array(7, np.float32),
    "float16": lambda: np.arange(12).astype(np.float16),
    "int32": lambda: np.arange(-3, 3, dtype=np.int32),
    "bool": lambda: np.array([True, False]),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_get_of_put_is_the_same_bits(backend: Backend, kind: str) -> None:
    array = ARRAYS[kind]()
    before = array.tobytes()
    got = backend.get(backend.put(array))
    assert same_bits(got, array)
    assert got.flags.c_contiguous
    assert array.tobytes() == before


def test_a_device_that_does_not_exist_is_a_usage_error() -> None:
    for name in ("torch", "jax"):
        with pytest.raises(UsageError) as error:
            load_backend(name, "nowhere")
        one_line(error.value, "no device 'nowhere'", "--device cpu")


def test_facts_are_words_that_name_the_backend(backend: Backend) -> None:
    facts = backend.facts()
    assert facts["backend"] == backend.name
    assert backend.name in BACKENDS
    assert {"backend", "device"} <= facts.keys()
    assert all(isinstance(value, str) for value in facts.values())


# Twins.

TWINS = ["svf_torch/components.py", "svf_jax/components.py", "stages/oracle/components.py"]


def functions(file: str) -> list[tuple[str, list[str], str]]:
    """Top-level functions of a file: name, parameter names, first docstring line; in order."""
    found = []
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name in {*REPLAY, "_v_transposed"}:
            arguments = [a.arg for a in (*node.args.args, *node.args.kwonlyargs)]
            found.append((node.name, arguments, (ast.get_docstring(node) or "").split("\n")[0]))
    return found


@pytest.mark.parametrize("file", TWINS)
def test_a_function_per_stage_in_order_with_its_declared_arguments(file: str) -> None:
    found = functions(file)
    assert [name for name, _, _ in found] == [*REPLAY, "_v_transposed"]
    for name, arguments, doc in found[:-1]:
        stage = REPLAY[name]
        assert arguments == [*stage.inputs, *stage.params, *stage.options]
        assert doc


def test_the_framework_twins_say_the_same_of_every_function() -> None:
    assert functions(TWINS[0]) == functions(TWINS[1])


def test_the_reference_differs_from_them_in_one_sentence_at_most() -> None:
    pairs = zip(functions(TWINS[0]), functions(TWINS[2]), strict=True)
    # Its last stage leaves the rounding to the boundary, and says so.
    assert [one[0] for one, other in pairs if one != other] in ([], ["final_bf16"])


def public(file: Path) -> list[str]:
    """Classes' methods and functions of a file, in order."""
    tree = ast.parse(file.read_text())
    nodes = [n for c in tree.body for n in (c.body if isinstance(c, ast.ClassDef) else [c])]
    return [n.name for n in nodes if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def test_backend_files_have_the_same_methods_in_the_same_order() -> None:
    expected = ["replay", "put", "get", "svd", "compile", "facts"]
    for package in ("svf_torch", "svf_jax"):
        assert [n for n in public(ROOT / package / "backend.py") if n in expected] == expected


def test_every_backend_has_exactly_the_declared_stages(backend: Backend) -> None:
    assert list(backend.replay) == list(REPLAY)


# Every stage against the oracle.


def check_against_oracle(task: ReplayTask, values: dict[str, np.ndarray]) -> None:
    rows = task.shape[0]
    params = {
        "source": task.source(0, rows),
        "offsets": task.offsets,
        "u": task.u(0, rows),
        "s": task.s,
        "v": task.v,
    }
    for stage in REPLAY.values():
        arguments = (*(values[n] for n in stage.inputs), *(params[n] for n in stage.params))
        options = {name: task.options[name] for name in stage.options}
        verdict, ratio = judge(consult(stage, arguments, options), values[stage.name])
        assert verdict.passes, f"{stage.name}: {verdict} ({ratio})"


SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.integers(1, 40).map(lambda n: (n, n)),
    st.sampled_from([(1, 1), (1, 40), (40, 1), (33, 7), (7, 33), (64, 64), (16, 300), (300, 16)]),
)
OFFSETS = st.sampled_from(["zero", "small", "negative", "mixed", "one negative sum"])


@settings(max_examples=15, deadline=None)  # XLA compiles ten stages anew for each shape
@given(shape=SHAPES, kind=OFFSETS, seed=st.integers(0, 99), layout=st.sampled_from(list(LAYOUTS)), turn=st.booleans())
def test_each_stage_agrees_with_the_oracle_on_any_shape(
    backend: Backend, shape: tuple[int, int], kind: str, seed: int, layout: str, turn: bool
) -> None:
    u, s, v = factors(*shape, seed)
    task = task_of(u, s, v, make_offsets(kind, s.size, seed), layout, turn)
    values = whole(backend, task)
    for name, stage in REPLAY.items():
        assert values[name].shape == task.stage_shape(stage)
        assert values[name].dtype == stored_dtype(stage.dtype)
        assert values[name].flags.c_contiguous
    check_against_oracle(task, values)


@settings(max_examples=6, deadline=None)
@given(shape=SHAPES, kind=OFFSETS, seed=st.integers(0, 99), data=st.data())
def test_a_sign_flip_of_a_pair_changes_no_bit(
    backend: Backend, shape: tuple[int, int], kind: str, seed: int, data: st.DataObject
) -> None:
    u, s, v = factors(*shape, seed)
    offsets = make_offsets(kind, s.size, seed)
    signs = np.float32(data.draw(st.lists(st.sampled_from([-1, 1]), min_size=s.size, max_size=s.size)))
    one, other = whole(backend, task_of(u, s, v, offsets)), whole(backend, task_of(u * signs, s, v * signs, offsets))
    for name in set(REPLAY) - {"u_scaled", "source_f32"}:
        assert same_bits(one[name], other[name]), name
    assert same_bits(one["u_scaled"] * signs, other["u_scaled"])


@settings(max_examples=15, deadline=None)
@given(shape=SHAPES, seed=st.integers(0, 99))
def test_layout_to_canonical_to_layout_is_bit_exact(shape: tuple[int, int], seed: int) -> None:
    _, _, v = factors(*shape, seed)
    for layout in LAYOUTS.values():
        stored = v if layout.transposed else np.ascontiguousarray(v.T)
        assert stored.shape == layout.expected_shape(v.shape[0], v.shape[1])
        contracted = reference._v_transposed(stored, layout.name)
        assert same_bits(np.ascontiguousarray(contracted), np.ascontiguousarray(v.T))
        again = contracted.T if layout.transposed else contracted
        assert same_bits(np.ascontiguousarray(again), stored)


@pytest.mark.parametrize("shape", [(192, 64), (64, 192), (64, 64), (1, 64), (65, 33)])
@pytest.mark.parametrize("layout", ["vh", "nx"])
def test_vh_given_v_transposed_is_torch_v_bit_for_bit(backend: Backend, shape: tuple[int, int], layout: str) -> None:
    u, s, v = factors(*shape, 1)
    offsets = make_offsets("small", s.size, 1)
    expected = whole(backend, task_of(u, s, v, offsets))
    found = whole(backend, task_of(u, s, v, offsets, layout))
    assert [name for name in REPLAY if not same_bits(found[name], expected[name])] == []


def test_a_square_v_of_the_wrong_layout_does_not_give_the_source_back(backend: Backend) -> None:
    u, s, v = factors(32, 32, 0)
    right = whole(backend, task_of(u, s, v, np.zeros(32, np.float32)))
    wrong = task_of(u, s, v.T.copy(), np.zeros(32, np.float32))
    source, zero = right["source_f32"], whole(backend, wrong)["zero_source_f32"]
    assert np.abs(right["zero_source_f32"] - source).max() < 1e-5
    assert np.abs(zero - source).max() > 1e-2


def test_a_v_that_does_not_fit_is_refused_with_the_expected_shape(backend: Backend) -> None:
    u, s, v = factors(8, 5, 0)
    task = ReplayTask("w", (8, 5), lambda a, b: u[a:b], s, v[:4], s, lambda a, b: u[a:b], "torch_v")
    with pytest.raises(InputError) as error:
        list(Replayer(backend).run(task))
    one_line(error.value, "torch_v needs V [5, 5]", "[4, 5]")


def test_a_layout_that_does_not_exist() -> None:
    with pytest.raises(UsageError) as error:
        layout_named("hv")
    one_line(error.value, "'hv'", "torch_v", "nx", "vh")


def test_with_zero_offsets_the_replay_gives_the_source_back(backend: Backend) -> None:
    u, s, v = factors(192, 64, 3)
    values = whole(backend, task_of(u, s, v, np.zeros(64, np.float32)))
    assert same_bits(values["scaled_s"], s)
    assert same_bits(values["matmul_pre_norm"], values["zero_source_f32"])
    assert float(values["normalization"][0]) == pytest.approx(1, abs=1e-6)


def test_inputs_are_not_modified(backend: Backend) -> None:
    u, s, v = factors(40, 20, 0)
    offsets = make_offsets("mixed", 20, 0)
    before = [a.tobytes() for a in (u, s, v, offsets)]
    whole(backend, task_of(u, s, v, offsets, transpose=True))
    assert [a.tobytes() for a in (u, s, v, offsets)] == before


def test_a_run_repeats_its_bits(backend: Backend) -> None:
    u, s, v = factors(70, 50, 0)
    task = task_of(u, s, v, make_offsets("mixed", 50, 0))
    one, other = whole(backend, task), whole(backend, task)
    assert all(same_bits(one[name], other[name]) for name in REPLAY)


# Compiled once per shape and options.


def test_each_stage_is_compiled_once_and_traced_once_per_shape(jax_backend: Backend) -> None:
    traces: list[str] = []
    compiled: list[str] = []

    class Counting:
        name = "jax"
        put, get, facts = staticmethod(jax_backend.put), staticmethod(jax_backend.get), staticmethod(jax_backend.facts)

        @property
        def replay(self) -> dict[str, Callable[..., Any]]:
            def counted(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
                @functools.wraps(fn)
                def call(*args: Any, **options: Any) -> Any:
                    traces.append(name)
                    return fn(*args, **options)

                return call

            return {name: counted(name, fn) for name, fn in jax_backend.replay.items()}

        def compile(self, fn: Callable[..., Any]) -> Callable[..., Any]:
            compiled.append(str(fn))
            return jax_backend.compile(fn)

    replayer = Replayer(Counting())
    u, s, v = factors(64, 16, 0)
    task = task_of(u, s, v, make_offsets("small", 16, 0))
    for _ in range(2):
        list(replayer.run(task, 16))
    assert len(compiled) == len(REPLAY)
    assert sorted(traces) == sorted(REPLAY), "four chunks of one shape, twice: one trace per stage"
    list(replayer.run(task, 32))
    by_rows = [name for name, stage in REPLAY.items() if stage.by_rows]
    assert sorted(traces) == sorted([*REPLAY, *by_rows]), "another shape is traced once more"


# Rows of near-zero weights, as embeddings of tokens never seen have: their rounding is no bug. Below 2^-126 XLA (and
# MKL, inside products) flushes to zero where numpy does not, and neither is wrong.


@pytest.mark.parametrize("scale", [1e-10, 1e-20, 1e-27, 1e-33, 1e-36, 1e-40, 1e15, 1e18])
def test_rows_of_tiny_and_huge_values_are_no_bug(backend: Backend, scale: float) -> None:
    u, s, v = factors(128, 64, 0)
    u[3:40] *= np.float32(scale)
    task = task_of(u, s, v, make_offsets("mixed", 64, 0))
    check_against_oracle(task, whole(backend, task))


@pytest.mark.parametrize("scale", [1e-20, 1e-27])
def test_and_in_such_rows_a_bug_is_still_found(backend: Backend, scale: float) -> None:
    u, s, v = factors(128, 64, 0)
    u *= np.float32(scale)
    task = task_of(u, s, v, make_offsets("mixed", 64, 0))
    values = whole(backend, task)
    values["matmul_pre_norm"] = values["matmul_pre_norm"] * np.float32(1 + 1e-3)
    with pytest.raises(AssertionError, match=f"matmul_pre_norm: {Verdict.BUG}"):
        check_against_oracle(task, values)


def test_the_helper_that_checks_stages_can_fail(torch_backend: Backend) -> None:
    u, s, v = factors(32, 16, 0)
    task = task_of(u, s, v, make_offsets("small", 16, 0))
    values = whole(torch_backend, task)
    values["matmul_pre_norm"] = values["matmul_pre_norm"] * np.float32(1.001)
    with pytest.raises(AssertionError, match=f"matmul_pre_norm: {Verdict.BUG}"):
        check_against_oracle(task, values)
