"""A = U diag(S) V^T in float64, rounded once to float32: accurate, and the same bits on any thread count.

A BLAS splits one product among its threads, and another count of threads rounds otherwise (1 against 2 changes nearly
every element of U and V). So every BLAS and LAPACK call here runs on one thread, over row chunks whose bounds
depend on the shape alone; chunks run side by side, and their results are added in chunk order.

Four methods, by shape and by the spread of the singular values (measured in `docs/findings/svd.md`):

    direct   small or nearly square: LAPACK gesdd on the whole matrix
    gram     tall, well-conditioned: V and S^2 from eigh(A^T A), U = A V / S
    qr       tall, sigma_min/sigma_max below 1e-3: V and S from the SVD of R, A = QR by chunks; U = A V / S
    qr_full  tall, below 1e-7 or rank-deficient: as qr, but U = Q U_R, which is orthonormal whatever S is

QR by chunks: Demmel et al., "Communication-optimal parallel and sequential QR and LU factorizations", 2012 (TSQR).
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from stages.errors import InputError, ResourceError

ReadRows = Callable[[int, int], np.ndarray]
Progress = Callable[[str, int, int], None]

# 64 MiB in float64: gesdd takes a second, and about four such arrays.
DIRECT_ELEMENTS = 2**23
# Less tall than this, the chunks' stacked R factors are no smaller than the matrix.
DIRECT_ASPECT = 4
# eigh(A^T A) errs by 1e-16 sigma_max^2, so U = A V / S is orthogonal to 1e-16 / ratio^2, here 1e-10. Measured: no
# difference from LAPACK after rounding to float32 at 1e-3, a slight one at 10^-3.5, 13 units of 2^-24 at 1e-5.
GRAM_RATIO = 1e-3
# The R of a QR errs by 1e-16 sigma_max, so U = A V / S is orthogonal to 1e-16 / ratio, here 1e-9. Measured: no
# difference at 1e-7, a slight one at 1e-8.
QR_RATIO = 1e-7
# 8192 x 1024 is 64 MiB in float64: long enough for full BLAS speed, and several fit into memory at once.
CHUNK_ROWS = 8192
# Chunks side by side hold about four float64 copies each; more workers than fit here wait. Bits do not depend on it.
WORKING_BYTES = 512 * 1024**2


_lock = threading.Lock()
_depth = 0
_limits: Any = None


@contextmanager
def single_threaded_blas() -> Iterator[None]:
    """One BLAS thread per call while any thread of the process is inside; re-entrant.

    `threadpool_limits` sets a property of the process and restores what it found, so two threads that overlap would
    restore each other's value. Here the first to enter sets it and the last to leave restores it. Unrelated BLAS calls
    made meanwhile run on one thread too.
    """
    global _depth, _limits
    with _lock:
        if _depth == 0:
            _limits = threadpool_limits(1, user_api="blas")
        _depth += 1
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                _limits.restore_original_limits()
                _limits = None


@dataclass(frozen=True)
class Decomposition:
    """The thin SVD of an [m, n] matrix, k = min(m, n); U is computed by row chunks when asked for.

    s       float32 [k], falling
    v       float32 [n, k], layout `torch_v`; in each column the first entry of largest magnitude is positive
    method  direct, gram, qr or qr_full
    u_rows, u_chunks, u   float32 rows of U; they read the source again for all methods but direct
    """

    s: np.ndarray
    v: np.ndarray
    shape: tuple[int, int]
    chunk_rows: int
    method: str
    _u_chunk: Callable[[int, int], np.ndarray]

    def u_rows(self, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of U, float32 [stop - start, k]: the same bits however U is cut.

        Whole chunks are computed, since a product of fewer rows may round otherwise: cut at multiples of `chunk_rows`.
        """
        if not 0 <= start <= stop <= self.shape[0]:
            raise IndexError(f"rows {start}:{stop} of a U with {self.shape[0]} rows")
        with single_threaded_blas():
            parts = [
                self._u_chunk(at, end)[max(start - at, 0) : stop - at]
                for at, end in _bounds(self.shape[0], self.chunk_rows)
                if at < stop and end > start
            ]
        empty = np.empty((0, len(self.s)), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate([empty, *parts])

    def u_chunks(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """(start, stop, rows of U) in order, computed in parallel; at most one chunk more than workers is held.

        Until the iterator ends or is closed, the process stays inside `single_threaded_blas`: restoring the limit
        between chunks costs OpenBLAS seconds.
        """
        bounds = _bounds(self.shape[0], self.chunk_rows)
        with single_threaded_blas():
            for (start, stop), rows in zip(bounds, _in_order(self._u_chunk, bounds, len(self.s)), strict=True):
                yield start, stop, rows

    def u(self) -> np.ndarray:
        """The whole of U, float32 [m, k]."""
        whole = np.empty((self.shape[0], len(self.s)), np.float32)
        for start, stop, rows in self.u_chunks():
            whole[start:stop] = rows
        return whole


def decompose(
    read_rows: ReadRows, shape: tuple[int, int], *, chunk_rows: int | None = None, progress: Progress | None = None
) -> Decomposition:
    """The SVD of the [m, n] matrix whose float32 rows [start, stop) are `read_rows(start, stop)`.

    `read_rows` must be safe to call from several threads. A tall matrix is read two to four times, a chunk of
    `chunk_rows` rows at a time (default max(8192, 2n); it may change the last bit of the result, the thread count
    may not). A wide one is read into memory and decomposed as its transpose. `progress(pass, rows_done, rows)` is
    called after each chunk. Extra memory: `WORKING_BYTES`, a few n x n matrices, and for `qr_full` six times
    m/chunk_rows of them.

    `InputError` for an empty matrix, NaN or Inf, or singular values beyond float32.
    """
    m, n = shape
    if m < 1 or n < 1:
        raise InputError(f"a matrix of shape {m} x {n} has no singular values; expected at least one row and column")
    rows = chunk_rows if chunk_rows is not None else max(CHUNK_ROWS, 2 * min(m, n))
    if rows < 1:
        raise ValueError(f"chunk_rows must be positive, not {rows}")
    with single_threaded_blas():
        if m < n:
            return _transposed(read_rows, shape, rows, progress)
        if m * n <= DIRECT_ELEMENTS or m <= DIRECT_ASPECT * n:
            return _direct(read_rows, shape, rows)
        return _gram(read_rows, shape, rows, progress) or _qr(read_rows, shape, rows, progress)


def _transposed(read_rows: ReadRows, shape: tuple[int, int], rows: int, progress: Progress | None) -> Decomposition:
    """A^T = U' S V'^T gives A = V' S U'^T; the sign rule then looks at U'."""
    m, n = shape
    source = np.asarray(read_rows(0, m), np.float32)
    inner = decompose(lambda start, stop: source[:, start:stop].T, (n, m), chunk_rows=rows, progress=progress)
    v = inner.u()
    signs = _signs(v)
    u = _canonical(inner.v, signs)
    return Decomposition(inner.s, _canonical(v, signs), shape, rows, inner.method, lambda a, b: u[a:b])


def _direct(read_rows: ReadRows, shape: tuple[int, int], rows: int) -> Decomposition:
    source = np.asarray(read_rows(0, shape[0]), np.float64)
    if not np.isfinite(source).all():
        raise _not_finite(shape)
    u64, s, vh = _lapack_svd(source)
    signs = _signs(vh.T)
    u = _canonical(u64, signs)
    return Decomposition(_rounded_s(s), _canonical(vh.T, signs), shape, rows, "direct", lambda a, b: u[a:b])


def _gram(read_rows: ReadRows, shape: tuple[int, int], rows: int, progress: Progress | None) -> Decomposition | None:
    """By eigh(A^T A); None when the smallest singular value is too small for it."""

    def product(start: int, stop: int) -> np.ndarray:
        chunk = np.asarray(read_rows(start, stop), np.float64)
        return chunk.T @ chunk

    bounds = _bounds(shape[0], rows)
    gram = np.zeros((shape[1], shape[1]))
    for (_, stop), part in zip(bounds, _in_order(product, bounds, shape[1]), strict=True):
        gram += part
        _report(progress, "gram", stop, shape[0])
    if not np.isfinite(gram).all():
        raise _not_finite(shape)
    try:
        values, vectors = np.linalg.eigh(gram)
    except np.linalg.LinAlgError as error:
        raise ResourceError(f"eigh of a {shape[1]} x {shape[1]} Gram matrix: {error}") from None
    values, vectors = values[::-1], vectors[:, ::-1]
    if not values[-1] > GRAM_RATIO**2 * values[0]:
        return None
    return _by_projection(read_rows, shape, rows, np.sqrt(values), vectors, "gram")


def _qr(read_rows: ReadRows, shape: tuple[int, int], rows: int, progress: Progress | None) -> Decomposition:
    """By the SVD of R, where A = Q R: chunk i is Q_i R_i, and the stacked R_i are Q_top R."""

    def factor(start: int, stop: int) -> np.ndarray:
        return _qr_r(np.asarray(read_rows(start, stop), np.float64))

    bounds = _bounds(shape[0], rows)
    factors = []
    for (_, stop), part in zip(bounds, _in_order(factor, bounds, shape[1]), strict=True):
        factors.append(part)
        _report(progress, "qr", stop, shape[0])
    sizes = [len(part) for part in factors]  # fewer than n rows where the last chunk has fewer
    stacked = np.concatenate(factors)
    del factors, part
    u_r, s, vh = _lapack_svd(_qr_r(stacked))
    if s[-1] > QR_RATIO * s[0]:
        return _by_projection(read_rows, shape, rows, s, vh.T, "qr")

    q_top = np.linalg.qr(stacked)[0]
    del stacked
    signs = _signs(vh.T)
    ends = np.cumsum(sizes)
    turn = {start: q_top[end - size : end] @ u_r for (start, _), size, end in zip(bounds, sizes, ends, strict=True)}
    del q_top

    def u_chunk(start: int, stop: int) -> np.ndarray:
        # Householder QR repeats itself bit by bit, so this Q_i belongs to the R_i of the first pass.
        q = np.linalg.qr(np.asarray(read_rows(start, stop), np.float64))[0]
        return _canonical(q @ turn[start], signs)

    return Decomposition(_rounded_s(s), _canonical(vh.T, signs), shape, rows, "qr_full", u_chunk)


def _by_projection(
    read_rows: ReadRows, shape: tuple[int, int], rows: int, s: np.ndarray, v: np.ndarray, method: str
) -> Decomposition:
    """U = A V / S, from float64 S and V."""
    v32 = v.astype(np.float32)
    signs = _signs(v32)
    scaled_v = np.ascontiguousarray(v * (signs / s))

    def u_chunk(start: int, stop: int) -> np.ndarray:
        return _canonical(np.asarray(read_rows(start, stop), np.float64) @ scaled_v, None)

    return Decomposition(_rounded_s(s), _canonical(v32, signs), shape, rows, method, u_chunk)


def _qr_r(matrix: np.ndarray) -> np.ndarray:
    # numpy's stubs say QRResult for every mode; mode "r" returns the factor alone.
    return np.asarray(np.linalg.qr(matrix, mode="r"))


def _lapack_svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    try:
        u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError as error:
        raise ResourceError(f"LAPACK gesdd on a {matrix.shape[0]} x {matrix.shape[1]} matrix: {error}") from None
    return u, s, vh


def _signs(v: np.ndarray) -> np.ndarray:
    """+1 or -1 per column of V: the sign of its first entry of largest magnitude."""
    # As float32, so that entries which the stored V cannot tell apart are a tie here too.
    magnitude = np.abs(v, dtype=np.float32, casting="same_kind")
    top = np.take_along_axis(v, magnitude.argmax(axis=0)[None, :], axis=0)[0]
    return np.where(top < 0, -1.0, 1.0)


def _canonical(columns: np.ndarray, signs: np.ndarray | None) -> np.ndarray:
    """`columns` times `signs`, as C-contiguous float32 without negative zeros (LAPACK's sign of zero is accidental)."""
    rounded = np.array(columns, np.float32, order="C")
    if signs is not None:
        rounded *= signs.astype(np.float32)
    rounded += np.float32(0)
    return rounded


def _rounded_s(s: np.ndarray) -> np.ndarray:
    if s[0] > np.finfo(np.float32).max:
        raise InputError(f"the largest singular value, {s[0]:.3g}, is beyond float32; scale the matrix down")
    return s.astype(np.float32)


def _not_finite(shape: tuple[int, int]) -> InputError:
    return InputError(f"a {shape[0]} x {shape[1]} matrix with NaN or Inf has no singular values; check the source")


def _bounds(m: int, rows: int) -> list[tuple[int, int]]:
    return [(start, min(start + rows, m)) for start in range(0, m, rows)]


def _report(progress: Progress | None, name: str, done: int, total: int) -> None:
    if progress is not None:
        progress(name, done, total)


def _workers(chunk_elements: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, WORKING_BYTES // max(1, 4 * 8 * chunk_elements)))


def _in_order(
    work: Callable[[int, int], np.ndarray], bounds: Sequence[tuple[int, int]], columns: int
) -> Iterator[np.ndarray]:
    """`work(start, stop)` of every chunk, in parallel, yielded in order; one chunk more than workers is in flight."""
    workers = _workers((bounds[0][1] - bounds[0][0]) * columns)
    if workers == 1 or len(bounds) == 1:
        yield from (work(start, stop) for start, stop in bounds)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix="svd")
    pending: deque[Future[np.ndarray]] = deque()
    try:
        for start, stop in bounds:
            pending.append(pool.submit(work, start, stop))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
