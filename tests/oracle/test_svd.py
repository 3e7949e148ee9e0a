"""The SVD: LAPACK's values after rounding to float32, orthonormal factors, the same bits on any thread count."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info

from stages.errors import InputError
from stages.oracle import svd

ULP = 2.0**-24


def spectrum(m: int, n: int, s: np.ndarray, seed: int = 0) -> np.ndarray:
    """A float32 [m, n] matrix with (nearly) the singular values `s`, 0 beyond them."""
    rng = np.random.default_rng(seed)
    u = np.linalg.qr(rng.standard_normal((m, len(s))))[0]
    v = np.linalg.qr(rng.standard_normal((n, len(s))))[0]
    return ((u * s) @ v.T).astype(np.float32)


def gaussian(m: int, n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n)).astype(np.float32)


def clustered(m: int, n: int) -> np.ndarray:
    return spectrum(m, n, np.sort(np.r_[np.full(n // 2, 1.0), np.linspace(0.1, 0.9, n - n // 2)])[::-1])


def duplicated(m: int, n: int) -> np.ndarray:
    source = gaussian(m, n)
    source[:, 3] = source[:, 1]
    return source


# name, what makes the matrix, the method it must take, whether singular values are separate enough to compare columns
CASES = [
    ("square", lambda: gaussian(96, 96), "direct", True),
    ("square, power law", lambda: spectrum(64, 64, np.arange(1.0, 65) ** -3), "direct", True),
    ("small tall", lambda: gaussian(300, 40), "direct", True),
    ("small wide", lambda: gaussian(40, 300), "direct", True),
    ("one row", lambda: gaussian(1, 50), "direct", True),
    ("one column", lambda: gaussian(50, 1), "direct", True),
    ("one number", lambda: np.float32([[-3.0]]), "direct", True),
    ("zero", lambda: np.zeros((30, 20), np.float32), "direct", False),
    ("identity", lambda: np.eye(20, dtype=np.float32), "direct", False),
    ("tall", lambda: gaussian(5000, 32), "gram", True),
    ("tall, huge values", lambda: gaussian(5000, 32) * np.float32(1e35), "gram", True),
    ("tall, tiny values", lambda: gaussian(5000, 32) * np.float32(1e-35), "gram", True),
    ("tall, power law", lambda: spectrum(5000, 64, np.arange(1.0, 65) ** -1), "gram", True),
    ("tall, clustered", lambda: clustered(5000, 64), "gram", False),
    ("tall, steep power law", lambda: spectrum(5000, 64, np.arange(1.0, 65) ** -2.5), "qr", True),
    ("tall, ratio 1e-6", lambda: spectrum(5000, 32, np.logspace(0, -6, 32)), "qr", True),
    ("tall, ratio 1e-9", lambda: spectrum(5000, 32, np.logspace(0, -9, 32)), "qr_full", False),
    ("tall, duplicate columns", lambda: duplicated(5000, 32), "qr_full", False),
    ("tall, rank 5 of 32", lambda: gaussian(5000, 5) @ gaussian(5, 32, 1), "qr_full", False),
    ("tall, a zero column", lambda: gaussian(5000, 32) * (np.arange(32) != 7).astype(np.float32), "qr_full", False),
    ("tall, zero", lambda: np.zeros((5000, 32), np.float32), "qr_full", False),
    ("tall, last chunk of 3 rows", lambda: spectrum(4003, 32, np.logspace(0, -9, 32)), "qr_full", False),
    ("wide, streamed", lambda: gaussian(32, 5000), "gram", True),
    ("wide, rank-deficient", lambda: gaussian(32, 5) @ gaussian(5, 5000, 1), "qr_full", False),
]


@pytest.fixture(autouse=True)
def small_limit(monkeypatch):
    """Tall means small here, so that every method runs on matrices that a test can afford."""
    monkeypatch.setattr(svd, "DIRECT_ELEMENTS", 2**14)


def decomposed(source: np.ndarray, chunk_rows: int | None = 1000) -> svd.Decomposition:
    return svd.decompose(lambda start, stop: source[start:stop], source.shape, chunk_rows=chunk_rows)


def faults(source: np.ndarray, s: np.ndarray, v: np.ndarray, u: np.ndarray, separate: bool) -> list[str]:
    """Which properties of an SVD in float32 do not hold; bounds are a few float32 units (2^-24)."""
    a = source.astype(np.float64)
    u0, s0, vh0 = np.linalg.svd(a, full_matrices=False)
    u, s, v = (x.astype(np.float64) for x in (u, s, v))
    if (u.shape, s.shape, v.shape) != (u0.shape, s0.shape, vh0.T.shape):
        return [f"shapes {u.shape} {s.shape} {v.shape}"]
    found = []
    # Below 1e-12 of the largest, float64 itself has no correct digits; 2^-150 is half of float32's smallest number.
    if not (abs(s - s0) <= 2 * ULP * s0 + 1e-12 * s0[0] + 2.0**-150).all():
        found.append("singular values")
    if (np.diff(s) > 0).any():
        found.append("order")
    for name, factor in (("U", u), ("V", v)):
        # Rounding moves a column of norm 1 by at most ULP in norm, an inner product of two by twice that.
        if not abs(factor.T @ factor - np.eye(len(s))).max() <= 4 * ULP:
            found.append(f"orthonormal {name}")
    if not np.linalg.norm((u * s) @ v.T - a) <= 4 * ULP * np.linalg.norm(a) + 1e-43:
        found.append("reconstruction")
    if separate:
        sign = np.sign((v * vh0.T).sum(axis=0))
        for name, ours, lapack in (("U", u, u0), ("V", v, vh0.T)):
            if not np.linalg.norm(ours * sign - lapack, axis=0).max() <= 2 * ULP:
                found.append(f"columns of {name}")
    top = abs(v).argmax(axis=0)
    if not (v[top, np.arange(len(s))] > 0).all():
        found.append("signs")
    return found


@pytest.mark.parametrize(("name", "make", "method", "separate"), CASES, ids=[case[0] for case in CASES])
def test_svd_equals_lapack_after_rounding(name, make, method, separate):
    source = make()
    result = decomposed(source)
    assert result.method == method
    assert result.s.dtype == result.v.dtype == result.u().dtype == np.float32
    assert faults(source, result.s, result.v, result.u(), separate) == []


@pytest.mark.parametrize(
    ("mutate", "fault"),
    [
        (lambda s, v, u: (s, v, u + np.eye(*u.shape, dtype=np.float32) * np.float32(1e-4)), "orthonormal U"),
        (lambda s, v, u: (s, v * np.float32(1 + 1e-6), u), "orthonormal V"),
        (lambda s, v, u: (s, v, u[:, [1, 0, *range(2, u.shape[1])]]), "columns of U"),
        (lambda s, v, u: (s * np.float32(1 + 5e-7), v, u), "singular values"),
        (lambda s, v, u: (s[::-1], v[:, ::-1], u[:, ::-1]), "order"),
        (lambda s, v, u: (s, -v, -u), "signs"),
        (lambda s, v, u: (s, v, -u), "reconstruction"),
        (lambda s, v, u: (s, v, np.full_like(u, np.nan)), "orthonormal U"),
        (lambda s, v, u: (s, v, u[:-1]), "shapes"),
    ],
)
def test_checker_fails_on_a_wrong_svd(mutate, fault):
    source = gaussian(5000, 32)
    right = decomposed(source)
    assert any(f.startswith(fault) for f in faults(source, *mutate(right.s, right.v, right.u()), True))


@pytest.mark.parametrize(
    "name", ["small tall", "tall", "tall, steep power law", "tall, rank 5 of 32", "wide, streamed"]
)
def test_u_has_the_same_bits_however_it_is_cut(name):
    source = next(case[1] for case in CASES if case[0] == name)()
    result = decomposed(source)
    whole = result.u().tobytes()
    m = source.shape[0]
    for step in (1000, 997, 3001) if m > 100 else (7,):
        pieces = [result.u_rows(at, min(at + step, m)) for at in range(0, m, step)]
        assert np.concatenate(pieces).tobytes() == whole
    assert b"".join(rows.tobytes() for _, _, rows in result.u_chunks()) == whole
    assert result.u_rows(5, 5).shape == (0, len(result.s))
    with pytest.raises(IndexError):
        result.u_rows(0, m + 1)


HASHES = """
import hashlib, os, sys
cores = int(sys.argv[1])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
import numpy as np
from stages.oracle import svd
svd.DIRECT_ELEMENTS = 2**19
rng = np.random.default_rng(0)
for m, n, fall in ((700, 700, 0), (700, 300, 0), (300, 900, 0), (12000, 96, 1), (12000, 96, 2), (12000, 96, 5)):
    a = (rng.standard_normal((m, n)) * np.arange(1.0, n + 1) ** -fall).astype(np.float32)
    d = svd.decompose(lambda start, stop: a[start:stop], (m, n), chunk_rows=1000)
    print(d.method, *(hashlib.sha256(x.tobytes()).hexdigest() for x in (d.s, d.v, d.u())))
"""


def test_bits_do_not_depend_on_threads_or_cores():
    def run(cores: int, threads: int) -> str:
        environment = {"OPENBLAS_NUM_THREADS": str(threads), "PYTHONPATH": ":".join(sys.path)}
        command = [sys.executable, "-c", HASHES, str(cores)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    one = run(1, 1)
    assert [line.split()[0] for line in one.splitlines()] == ["direct"] * 3 + ["gram", "qr", "qr_full"]
    assert run(64, 1) == one
    assert run(64, 2) == one
    assert run(1, 2) == one


def test_two_threads_at_once_get_the_same_bits():
    source = gaussian(5000, 32)
    alone = decomposed(source).u().tobytes()
    results: list[bytes] = []
    threads = [threading.Thread(target=lambda: results.append(decomposed(source).u().tobytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [alone] * 4


def blas_threads() -> list[int]:
    return [library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"]


def test_single_threaded_blas_nests_overlaps_and_restores():
    before = blas_threads()
    first, second = svd.single_threaded_blas(), svd.single_threaded_blas()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)  # the first to enter leaves first, as two threads may
    assert set(blas_threads()) == {1}
    second.__exit__(None, None, None)
    assert blas_threads() == before
    with pytest.raises(KeyError), svd.single_threaded_blas():
        raise KeyError
    assert blas_threads() == before


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (5000, 32), (32, 5000)])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_inf_are_refused(shape, value):
    source = gaussian(*shape)
    source[shape[0] // 2, shape[1] // 2] = value
    with pytest.raises(InputError, match="NaN or Inf"):
        decomposed(source)


def test_an_empty_matrix_and_an_overflowing_one_are_refused():
    with pytest.raises(InputError, match="at least one row"):
        decomposed(np.empty((0, 4), np.float32))
    with pytest.raises(InputError, match="beyond float32"):
        decomposed(np.full((5000, 32), 3e38, np.float32) * np.sign(gaussian(5000, 32)))


def test_an_error_while_reading_reaches_the_caller():
    def read_rows(start: int, stop: int) -> np.ndarray:
        raise InputError(f"rows {start}:{stop} are truncated")

    with pytest.raises(InputError, match="truncated"):
        svd.decompose(read_rows, (5000, 32), chunk_rows=1000)


def test_progress_names_each_pass_and_reaches_the_end():
    source, seen = duplicated(5000, 32), []
    svd.decompose(lambda a, b: source[a:b], source.shape, chunk_rows=2000, progress=lambda *step: seen.append(step))
    assert seen == [(name, done, 5000) for name in ("gram", "qr") for done in (2000, 4000, 5000)]


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    rank=st.integers(0, 60),
    rows=st.integers(1, 70),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_rank(m, n, rank, rows, seed):
    small = gaussian(m, max(1, min(rank, m, n)), seed) @ gaussian(max(1, min(rank, m, n)), n, seed + 1)
    source = small if rank else np.zeros_like(small)
    limits = svd.DIRECT_ELEMENTS, svd.DIRECT_ASPECT
    try:
        svd.DIRECT_ELEMENTS, svd.DIRECT_ASPECT = (0, 1) if seed % 2 else limits
        result = decomposed(source, rows)
        assert faults(source, result.s, result.v, result.u(), separate=False) == []
    finally:
        svd.DIRECT_ELEMENTS, svd.DIRECT_ASPECT = limits


def test_the_module_loads_neither_torch_nor_jax():
    code = "import sys, stages.oracle.svd; assert not {'torch', 'jax'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path)})
