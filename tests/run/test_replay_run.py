"""Row chunks: they cover all rows, none is short, and no bit depends on them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from helpers import one_line
from hypothesis import given
from hypothesis import strategies as st
from replays import factors, make_offsets, task_of, whole

from stages.errors import UsageError
from stages.judge.metrics import same_bits
from stages.run.replay import CHUNK_BYTES, MIN_CHUNK_ROWS, Replayer, chunk_plan, default_chunk_rows
from stages.spec.backend import Backend
from stages.spec.replay import REPLAY


@given(rows=st.integers(1, 5000), chunk_rows=st.integers(MIN_CHUNK_ROWS, 6000))
def test_a_plan_covers_all_rows_once_in_order_and_no_chunk_is_short(rows: int, chunk_rows: int) -> None:
    plan = chunk_plan(rows, chunk_rows)
    assert plan[0][0] == 0
    assert plan[-1][1] == rows
    assert all(before[1] == after[0] for before, after in itertools.pairwise(plan))
    sizes = [stop - start for start, stop in plan]
    assert min(sizes) >= min(MIN_CHUNK_ROWS, rows)
    assert max(sizes) < chunk_rows + MIN_CHUNK_ROWS
    assert all(size == chunk_rows for size in sizes[:-1])


@pytest.mark.parametrize("chunk_rows", [-1, 0, 1, MIN_CHUNK_ROWS - 1])
def test_shorter_chunks_are_refused(chunk_rows: int) -> None:
    with pytest.raises(UsageError) as error:
        chunk_plan(100, chunk_rows)
    one_line(error.value, f"--chunk-rows {chunk_rows}", f"at least {MIN_CHUNK_ROWS}")


def test_chunks_are_at_least_the_eight_rows_that_the_libraries_need() -> None:
    assert MIN_CHUNK_ROWS >= 8


@given(rows=st.integers(1, 200_000), cols=st.integers(1, 20_000))
def test_the_default_fits_the_budget_or_is_the_smallest(rows: int, cols: int) -> None:
    chunk = default_chunk_rows((rows, cols))
    rank = min(rows, cols)
    per_row = sum(4 * (cols if "cols" in s.shape else rank) for s in REPLAY.values() if s.by_rows)
    assert chunk == MIN_CHUNK_ROWS or chunk * per_row <= CHUNK_BYTES
    assert chunk_plan(rows, chunk)


def test_an_embedding_is_cut_and_a_layers_weight_is_not() -> None:
    assert len(chunk_plan(151_936, default_chunk_rows((151_936, 1024)))) > 10
    assert len(chunk_plan(3072, default_chunk_rows((3072, 1024)))) == 1


# rows, cols: tall, square, wide; with rows just around multiples of the chunk, so that tails of every length occur.
SHAPES = [(64, 64), (97, 32), (200, 48), (48, 200), (130, 1), (129, 130), (257, 512)]
CHUNKS = [16, 17, 24, 31, 32, 48, 63, 64, 100, 127, 128]


@pytest.mark.cover(1)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_chunked_and_whole_are_bit_identical(backend: Backend, shape: tuple[int, int], transpose: bool) -> None:
    u, s, v = factors(*shape, 0)
    task = task_of(u, s, v, make_offsets("mixed", s.size, 0), transpose=transpose)
    expected = whole(backend, task, shape[0] + MIN_CHUNK_ROWS)
    # XLA compiles every shape anew, so jax gets fewer sizes than torch.
    for chunk_rows in CHUNKS if backend.name != "jax" else CHUNKS[::5]:
        found = whole(backend, task, chunk_rows)
        different = [name for name in REPLAY if not same_bits(found[name], expected[name])]
        assert different == [], chunk_rows


@pytest.mark.parametrize("tail", range(17, 33))
def test_every_length_of_tail_in_torch(torch_backend: Backend, tail: int) -> None:
    u, s, v = factors(64 + tail % 16, 96, tail)
    task = task_of(u, s, v, make_offsets("mixed", s.size, 0))
    expected = whole(torch_backend, task, 1000)
    for chunk_rows in (16, 32, 64):
        found = whole(torch_backend, task, chunk_rows)
        assert all(same_bits(found[name], expected[name]) for name in REPLAY)


def test_stages_without_rows_are_in_the_first_chunk_and_shared_with_all(backend: Backend) -> None:
    u, s, v = factors(70, 20, 0)
    chunks = list(Replayer(backend).run(task_of(u, s, v, make_offsets("small", 20, 0)), 32))
    assert [(c.start, c.stop) for c in chunks] == [(0, 32), (32, 70)]
    whole_stages = {"offsets_f32", "scaled_s", "normalization"}
    assert whole_stages <= chunks[0].values.keys()
    assert not whole_stages & chunks[1].values.keys()
    for stage in REPLAY.values():
        assert chunks[1].arguments(stage) is not None
    assert np.array_equal(chunks[1].params["u"], u[32:70])


def test_an_argument_that_is_not_recorded_is_none_not_a_guess(backend: Backend) -> None:
    u, s, v = factors(20, 20, 0)
    chunk = next(iter(Replayer(backend).run(task_of(u, s, v, s))))
    values = {name: array for name, array in chunk.values.items() if name != "u_scaled"}
    cut = type(chunk)(0, 20, values, {}, chunk.params)
    assert cut.arguments(REPLAY["matmul_pre_norm"]) is None
    assert cut.arguments(REPLAY["zero_source_f32"]) is not None
