"""Do stored U, S and V give a tensor back, contracted which way? What every command asks before it believes a label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from stages.errors import InputError
from stages.oracle.bounds import residual_bound
from stages.spec.layouts import LAYOUTS
from stages.spec.values import ReplayTask

# Rows looked at: enough to tell a wrong contraction, which misses by about the weights' own size.
ROWS = 256
# The right contraction beats the wrong one by five orders, noise by less than one.
_MUCH_LESS = 1e-3


@dataclass(frozen=True)
class Told:
    """What the first rows of a tensor say of a declared layout.

    `fitting`: layouts of the other contraction, which gives the source back where the declared one does not; empty
    when the label is right, or when neither fits. `why`: what belies the label.
    """

    declared: str
    fitting: tuple[str, ...] = ()
    why: str = ""

    @property
    def right(self) -> str:
        """The layout to contract with: the declared one unless another is shown to be right."""
        return self.fitting[0] if self.fitting else self.declared

    def lie(self, name: str) -> str:
        """The wrong label in words, and what to do about it."""
        return f"{name}: {self.why}; the label is wrong: give --layout {self.right}, or correct component_v_layout"


def look(task: ReplayTask, declared: str) -> Told:
    """What the first rows of a tensor tell of the layout that its bundle declares; its offsets play no part.

    `InputError` when V fits no layout by its shape, or the source is not finite there.
    """
    rows = min(ROWS, task.shape[0])
    source = task.source(0, rows).astype(np.float64)
    if not np.isfinite(source).all():
        raise InputError(f"{task.source_name}: the source has NaN or infinity in its first {rows} rows")
    found = {turned: _missed(task, source, rows, turned) for turned in (True, False)}
    turned = LAYOUTS[declared].transposed
    own, other = found[turned], found[not turned]
    scale = residual_bound(task.s.size) * float(np.linalg.norm(source))
    others = tuple(name for name, row in LAYOUTS.items() if row.transposed != turned)
    if own is None:
        expected = LAYOUTS[declared].expected_shape(task.shape[1], task.s.size)
        why = f"declared layout {declared} needs V {list(expected)}, the bundle has {list(task.v.shape)}"
        if other is None or other > scale:
            raise InputError(f"{task.source_name}: {why}")
        return Told(declared, others, why)
    if other is None or own <= scale or other >= _MUCH_LESS * own:
        return Told(declared)
    residuals = f"a residual of {own:.3g} in the first {rows} rows, {', '.join(others)} one of {other:.3g}"
    return Told(declared, others, f"declared layout {declared} leaves {residuals}")


def _missed(task: ReplayTask, source: np.ndarray, rows: int, turned: bool) -> float | None:
    right = task.v.T if turned else task.v
    if right.shape != (task.s.size, task.shape[1]):
        return None
    us = (task.u(0, rows) * task.s).astype(np.float64)
    return float(np.linalg.norm(source - us @ right.astype(np.float64)))


def zero_offset(task: ReplayTask, layout: str) -> Callable[[int, int], np.ndarray]:
    """Rows of (U * S) V^T under `layout`, float32."""
    right = task.v.T if LAYOUTS[layout].transposed else task.v
    return lambda start, stop: (task.u(start, stop) * task.s) @ right
