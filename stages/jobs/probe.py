"""`svf probe`: each backend in a process of its own, on all threads and on one; what was revealed, kept in a cache."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.errors import UsageError
from stages.files import cache
from stages.order import black_boxes as boxes
from stages.order import probe
from stages.order.reveal import NoTreeError
from stages.progress import Progress
from stages.run.calibration import cpu_model
from stages.run.children import document_of, run_child
from stages.spec.backend import Backend, Loader
from stages.sums.orders import Order, words
from stages.sums.text import format_order

SCHEMA = "svf.probe/1"
# M, N, K of products: one row, few, many; narrow and wide; K below, at, above and off the blocks of known libraries.
PRODUCT_SHAPES = {
    "matmul_pre_norm (torch_v)": ((64, 64, 64), (48, 40, 40), (100, 200, 777), (64, 1024, 1024), (64, 256, 3072)),
    "matmul_pre_norm (vh, nx)": ((64, 1024, 1024),),
    "lm_head": ((1, 256, 1024), (1, 256, 3072), (5, 256, 1024), (64, 256, 1024), (64, 256, 3072)),
    "attn_scores": ((5, 5, 128), (64, 64, 128)),
    "attention": ((5, 128, 5), (64, 128, 64)),
}
SUMS = (64, 1000, 1024)
SQUARES = (64, 128, 1024)
SQUARES_ROWS = 16
SOFTMAX = (5, 64, 100)
# Of these the one-line summary tells: the stage, and which of its shapes, first or last; its largest part.
_SUMMARY = {
    "products": ("matmul_pre_norm (torch_v)", -1),
    "one row": ("lm_head", 0),
    "sums": ("normalization", -1),
    "mean squares": ("final_norm", -1),
    "softmax": ("attn_softmax", -1),
}


@dataclass(frozen=True)
class ProbeCommand:
    """The parsed command; fields as in `svf probe --help`."""

    backends: tuple[str, ...]
    device: str = "cpu"
    threads: int | None = None
    fresh: bool = False


@dataclass(frozen=True)
class ProbeRequest:
    """What the child of one backend is asked."""

    job: ClassVar[str] = "probe"

    backend: str
    device: str
    threads: int


def limit_threads(count: int) -> None:
    """Keep this process on `count` processors, before a framework is loaded and starts a thread on each."""
    available = sorted(os.sched_getaffinity(0))
    if count > len(available):
        raise UsageError(f"--threads {count}: this process may use {len(available)} processors")
    os.sched_setaffinity(0, available[:count])


def probe_all(command: ProbeCommand, progress: Progress) -> dict[str, Any]:
    """The `svf.probe/1` document of every asked backend, on all threads and on one."""
    most = cache.threads_available()
    counts = (command.threads,) if command.threads else tuple(dict.fromkeys((most, 1)))
    runs = []
    for name in command.backends:
        for threads in counts:
            key = cache.identity(name, command.device, threads, cpu_model())
            kept = None if command.fresh else cache.load(key)
            if kept is None:
                progress.say(f"probing {name} on {threads} thread{'s' if threads > 1 else ''}")
                kept = _child(name, command.device, threads, progress)
                cache.store(key, kept)
            runs.append({**kept, "device": command.device, "threads": threads})
    return document(runs)


def _child(name: str, device: str, threads: int, progress: Progress) -> dict[str, Any]:
    environment = dict.fromkeys(cache.THREAD_VARIABLES, str(threads))
    child = run_child(ProbeRequest(name, device, threads), environment, progress=progress)
    run: dict[str, Any] = document_of(name, child)
    return run


def probe_request(request: ProbeRequest, load: Loader, progress: Progress) -> dict[str, Any]:
    """The child's side: one backend on so many threads."""
    limit_threads(request.threads)
    return probe_backend(load(request.backend, request.device), progress)


def document(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """`svf.probe/1`: the runs, what threads change per backend, and whether every tree was revealed."""
    differ: dict[str, list[str]] = {}
    for run in runs:
        first = next(other for other in runs if other["backend"] == run["backend"])
        differ.setdefault(run["backend"], []).extend(
            item["what"] for item, other in zip(run["items"], first["items"], strict=True) if item != other
        )
    complete = all(item["note"] is None for run in runs for item in run["items"])
    return {"schema": SCHEMA, "complete": complete, "threads_change": differ, "runs": list(runs)}


def probe_backend(backend: Backend, progress: Callable[[str, float], None]) -> dict[str, Any]:
    """Everything that is probed of one backend in this process: items, a one-line summary, seconds."""
    start, items = time.monotonic(), []
    tasks = list(_tasks(backend))
    for done, (what, shape, reveal) in enumerate(tasks):
        progress(f"probing {backend.name} {what}", done / len(tasks))
        try:
            parts, note = reveal(), None
        except NoTreeError as error:
            parts, note = [], str(error)
        items.append({"what": what, "shape": list(shape), "parts": parts, "note": note})
    return {
        "backend": backend.name,
        "facts": backend.facts(),
        "summary": _summary(items),
        "items": items,
        "seconds": round(time.monotonic() - start, 1),
    }


_Task = tuple[str, tuple[int, ...], Callable[[], list[dict[str, Any]]]]


def _tasks(backend: Backend) -> Iterator[_Task]:
    for what, make in boxes.PRODUCTS.items():
        box = make(backend)
        for shape in PRODUCT_SHAPES[what]:
            yield what, shape, functools.partial(_regions, box, shape)
    total, softmax = boxes.total(backend), boxes.softmax(backend)
    for what, sizes, reveal in (
        ("normalization", SUMS, functools.partial(probe.total, total)),
        ("final_norm", SQUARES, functools.partial(_squares, backend)),
        ("attn_softmax", SOFTMAX, functools.partial(probe.softmax, softmax)),
    ):
        for size in sizes:
            yield what, (size,), functools.partial(_sum, reveal, size)


def _sum(reveal: Callable[[int], Order], size: int) -> list[dict[str, Any]]:
    return [_part(reveal(size))]


def _squares(backend: Backend, size: int) -> Order:
    return probe.SquaresProbe(boxes.mean_of_squares(backend, size), size, SQUARES_ROWS).order()


def _regions(box: boxes.ProductBox, shape: tuple[int, int, int]) -> list[dict[str, Any]]:
    return [
        {"rows": region.rows, "cols": region.cols, "elements": region.elements, **_part(region.order, "K")}
        for region in probe.ProductProbe(box, shape).regions()
    ]


def _part(order: Order, what: str = "terms") -> dict[str, Any]:
    return {"order": format_order(order), "words": words(order, what)}


def _summary(items: Sequence[dict[str, Any]]) -> str:
    told = []
    for label, (what, at) in _SUMMARY.items():
        parts = [item["parts"] for item in items if item["what"] == what][at]
        told.append(f"{label}: {parts[0]['order'] if parts else 'not revealed'}")
    return "; ".join(told)
