"""Judging both sides of a pair: from one read of the weights, and side by side where that is sooner."""

from __future__ import annotations

import contextvars
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np

from stages.files.forward_dump import Place
from stages.judge.forward import is_small, judge_place
from stages.judge.recorded_run import ForwardRun
from stages.judge.rows import Row
from stages.oracle.svd import single_threaded_blas
from stages.recipes.side import SideVerdict
from stages.spec.backend import Weights

# A side's place, its run and what it recorded there.
Job = tuple[Place, ForwardRun, np.ndarray]
Judging = Callable[[Sequence[Job]], list[SideVerdict | None]]

# Weights kept for the other side: those of one stage, but for the largest models.
_KEPT_BYTES = 1 << 27


class RecentWeights:
    """A reader of weights that keeps what it read last: both sides of a stage ask for the same."""

    def __init__(self, weights: Weights):
        self._weights, self._lock = weights, threading.Lock()
        self._kept: OrderedDict[tuple[str, int, int | None], np.ndarray] = OrderedDict()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        key = (name, start, stop)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._weights.read(name, start, stop)
            self._kept.move_to_end(key)
            while len(self._kept) > 1 and sum(array.nbytes for array in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return self._kept[key]


def share_weights(a: ForwardRun, b: ForwardRun) -> None:
    """Have both sides read the weights through one reader, where they are of one folder and not adapted."""
    if a.checkpoint is None or b.checkpoint is None or a.weights is not a.checkpoint or b.weights is not b.checkpoint:
        return
    if a.checkpoint.path.resolve() == b.checkpoint.path.resolve():
        a.weights = b.weights = RecentWeights(a.checkpoint)


def each(row: Callable[[Place], Row], places: Sequence[Place], in_turn: bool) -> Iterator[Row]:
    """The row of each place: one after the other, or on two threads where nothing but their arrays is looked at."""
    if in_turn:
        yield from map(row, places)
        return
    with ThreadPoolExecutor(2, thread_name_prefix="compare") as pool:
        yield from pool.map(row, places)


@contextmanager
def judging(a: ForwardRun, b: ForwardRun) -> Iterator[Judging]:
    """How to judge some places within it: on a thread each, with one BLAS thread, where the model is large enough.

    BLAS has work for two threads in the products alone, and its threads wait for one another: on a machine that is busy
    otherwise that took four times the processor time (docs/findings/speed.md).
    """
    if is_small(a) or is_small(b) or len(os.sched_getaffinity(0)) < 2:
        yield lambda jobs: [judge_place(*job) for job in jobs]
        return
    with single_threaded_blas(), ThreadPoolExecutor(2, thread_name_prefix="judge") as pool:

        def judged(jobs: Sequence[Job]) -> list[SideVerdict | None]:
            # numpy's settings of errors are of a context, and a thread begins with none.
            running = [pool.submit(contextvars.copy_context().run, lambda job=job: judge_place(*job)) for job in jobs]
            return [future.result() for future in running]

        yield judged
