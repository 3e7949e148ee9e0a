"""Random components, and replays of them."""

from __future__ import annotations

import numpy as np

from stages.run.replay import Replayer
from stages.spec.backend import Backend
from stages.spec.layouts import LAYOUTS
from stages.spec.replay import REPLAY
from stages.spec.values import ReplayTask


def factors(rows: int, cols: int, seed: int, *, power: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, S and V (torch_v) of a random weight with a power-law spectrum."""
    rng, rank = np.random.default_rng(seed), min(rows, cols)
    u, _ = np.linalg.qr(rng.standard_normal((rows, rank)))
    v, _ = np.linalg.qr(rng.standard_normal((cols, rank)))
    s = np.arange(1, rank + 1, dtype=np.float64) ** -power
    return u.astype(np.float32), s.astype(np.float32), v.astype(np.float32)


def task_of(
    u: np.ndarray, s: np.ndarray, v: np.ndarray, offsets: np.ndarray, layout: str = "torch_v", transpose: bool = False
) -> ReplayTask:
    """A task whose source is what the factors give."""
    source = ((u * s).astype(np.float64) @ v.T.astype(np.float64)).astype(np.float32)
    stored = v if LAYOUTS[layout].transposed else np.ascontiguousarray(v.T)
    shape = (u.shape[0], v.shape[0])
    return ReplayTask("w", shape, lambda a, b: u[a:b], s, stored, offsets, lambda a, b: source[a:b], layout, transpose)


def whole(backend: Backend, task: ReplayTask, chunk_rows: int | None = None) -> dict[str, np.ndarray]:
    """All stages of a task, chunks joined."""
    parts: dict[str, list[np.ndarray]] = {}
    for chunk in Replayer(backend).run(task, chunk_rows):
        for name, array in chunk.values.items():
            parts.setdefault(name, []).append(array)
    return {n: np.concatenate(p, task.row_axis(REPLAY[n])) if len(p) > 1 else p[0] for n, p in parts.items()}


def make_offsets(kind: str, rank: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    made = {
        "zero": np.zeros(rank),
        "small": rng.uniform(-0.17, 0.17, rank),
        "negative": rng.uniform(-0.9, -0.1, rank),
        "mixed": rng.uniform(-0.9, 3.0, rank),
        "one negative sum": np.full(rank, -1.5),  # sum(scaled_s) below zero is defined
    }
    return made[kind].astype(np.float32)
