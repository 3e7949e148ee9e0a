"""Numbers that a mod leaves open, estimated from what was recorded: eps, temperature, one factor of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np

from stages.oracle.bounds import TINY, U32, rounding_unit
from stages.oracle.rounding import round_once
from stages.recipes import norm as norms
from stages.recipes.at import At
from stages.recipes.elements import interval, shortest
from stages.recipes.recorded_product import cell

# A fitted number must exclude the right one by this much of it.
CLEAR = 256 * U32
# How near to what the frequencies say a number with few digits must be.
_NEAR = 3e-7


def filled(at: At, name: str, observed: np.ndarray, right: np.ndarray) -> float | None:
    """The number called `name` that the record speaks for; None where it says nothing, or it is the right one."""
    with np.errstate(all="ignore"):
        return _ESTIMATES[name](at, observed.astype(np.float64), right)


def _eps(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """From rows in which eps weighs most."""
    x, w = norms.inputs(at).mid, at.params()[-1][1]
    weighted = x * w
    root = (y * weighted).sum(axis=-1) / np.maximum((weighted * weighted).sum(axis=-1), 1e-300)
    square = (x * x).mean(axis=-1)
    eps = (1 / root**2 - square).reshape(-1)
    some = eps[np.argsort(square.reshape(-1))][: max(1, eps.size // 8)]
    found = float(f"{max(float(np.median(some)), 0.0):.2g}")
    return None if not np.isfinite(found) or abs(found - at.options["eps"]) < 1e-3 * at.options["eps"] else found


def _temperature(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """log p_i - log p_j = (s_i - s_j) / T, weighed by p."""
    p = np.where(right > 0, y, 0.0)
    s = np.where(right > 0, at.input(0).mid, 0.0)
    logs = np.where(p > 0, np.log(np.where(p > 0, p, 1)), 0.0)
    total = np.maximum(p.sum(axis=-1, keepdims=True), 1e-300)
    x, z = (np.where(p > 0, v - (p * v).sum(axis=-1, keepdims=True) / total, 0.0) for v in (s, logs))
    squares = float((p * x * x).sum())
    slope = float((p * x * z).sum()) / squares if squares else 1.0
    if slope <= 0 or abs(slope - 1) < CLEAR:
        return None
    return float(f"{1 / slope:.3g}") if abs(float(f"{1 / slope:.3g}") - 1) >= CLEAR else 1 / slope


def _theta(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """From the logarithms of the frequencies, which are in proportion to theta's."""
    if len(y) < 2 or (y[1:] <= 0).any():
        return None
    own = at.options["rope_theta"]
    theta = float(np.exp(np.log(own) * np.median(np.log(y[1:]) / np.log(right[1:]))))
    short = next((v for d in (1, 2, 4, 6) for v in [float(f"{theta:.{d}g}")] if abs(v / theta - 1) < _NEAR), theta)
    return None if short <= 1 or abs(short / own - 1) < CLEAR else short


_ESTIMATES: Mapping[str, Callable[[At, np.ndarray, np.ndarray], float | None]] = MappingProxyType(
    {"eps": _eps, "temperature": _temperature, "theta": _theta}
)


def one_factor(at: At, observed: np.ndarray, right: np.ndarray) -> tuple[str, int] | None:
    """The one number that all values are times what they should be, in words, and how many bits it gives.

    Each value says between which two it lies: as far as its own cell and the stage's noise go, and then one rounding
    more, where it was stored first. None where there is no such number, or it may be 1.
    """
    assert at.right is not None
    noise = at.right(at)
    y, wide = observed.astype(np.float64), float(np.vdot(right, right))
    if not wide or not y.any() or noise.mid.shape != right.shape:
        return ("all values are 0", 0) if wide and not y.any() else None
    fitted = float(np.vdot(right, y)) / wide
    least, most = cell(observed)
    room = (noise.hi - noise.lo) / 2 * abs(fitted) + TINY + U32 * np.abs(y)
    for again in (0.0, rounding_unit(observed.dtype)):
        e = room + again * np.abs(y)
        low, high = (float(edge[0]) for edge in interval(*(x.reshape(-1, 1) for x in (least - e, most + e, right))))
        if low <= high and (high < 1 - CLEAR or low > 1 + CLEAR):
            factor = shortest(low, high)
            for text, usual in _scales(at).items():
                if low <= usual <= high:
                    return text, int(np.count_nonzero(round_once(right * usual, observed.dtype) == observed))
            bits = int(np.count_nonzero(round_once(right * factor, observed.dtype) == observed))
            return f"every value is {factor:.9g} times what it should be", bits
    return None


def _scales(at: At) -> dict[str, float]:
    """By what factor scores are off whose scale goes by another of the model's sizes."""
    scaling = at.options.get("scaling")
    if scaling is None:
        return {}
    sizes = at.oracle.sizes.items()
    return {f"the scale is 1/sqrt({name}), {size}, not 1/sqrt(head_dim)": size**-0.5 / scaling for name, size in sizes}
