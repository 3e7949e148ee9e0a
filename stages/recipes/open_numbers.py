"""Numbers that a mod leaves open, estimated from what was recorded: eps, temperature, cap, theta, one factor of all."""

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
from stages.spec.dtypes import stored_dtype
from stages.spec.noise import Noise

# A fitted number must exclude the right one by this much of it.
CLEAR = 256 * U32
# How near to what the frequencies say a number with few digits must be.
_NEAR = 3e-7


def filled(at: At, name: str, observed: np.ndarray, right: np.ndarray) -> float | None:
    """The number called `name` that the record speaks for; None where it says nothing, or it is the right one."""
    with np.errstate(all="ignore"):
        return _ESTIMATES[name](at, observed.astype(np.float64), right)


def _eps(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """The one of fewest digits that no value excludes: each says between which two its row's root lies."""
    x, w = norms.inputs(at).mid, at.params()[-1][1]
    x, weighted, y = (a.reshape(-1, x.shape[-1]) for a in (x, x * w, y))
    # Rounded before the product with the weight and after it.
    off = (
        1.5 * rounding_unit(stored_dtype(at.inside)) + rounding_unit(stored_dtype(at.stage.dtype)) + 4 * U32
    ) * np.abs(y)
    smallest, largest = interval((y - off).T, (y + off).T, weighted.T)
    square = (x * x).mean(axis=-1)
    some = (smallest > 0) & np.isfinite(largest)
    least, most = (edge[some] ** -2.0 - square[some] for edge in (largest, smallest))
    low, high = max(float(least.max(initial=0.0)), 0.0), float(most.min(initial=np.inf))
    own = at.options["eps"]
    if not low <= high < np.inf or low <= own * (1 + 1e-3) <= high:
        return None
    return shortest(low, high)


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


def _cap(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """The one of fewest digits of which the score that is cut most is what it is, give or take its own rounding."""
    where = np.unravel_index(np.argmax(np.abs(right - y)), y.shape)
    s, cut = abs(float(right[where])), abs(float(y[where]))
    off = (2 * rounding_unit(stored_dtype(at.stage.dtype)) + 16 * U32) * s
    if cut + off >= s or not cut > off:
        return None
    return shortest(_capped_at(s, cut - off), _capped_at(s, cut + off))


def _capped_at(s: float, cut: float) -> float:
    """The c of which c tanh(s / c) is `cut`, which grows with it; halved 60 times, it is one of float64."""
    low, high = cut, max(1e6 * s, 2 * cut)
    for _ in range(60):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if middle * np.tanh(s / middle) < cut else (low, middle)
    return high


def _theta(at: At, y: np.ndarray, right: np.ndarray) -> float | None:
    """From the logarithms of the frequencies, which are in proportion to theta's."""
    if len(y) < 2 or (y[1:] <= 0).any():
        return None
    own = at.options["rope_theta"]
    theta = float(np.exp(np.log(own) * np.median(np.log(y[1:]) / np.log(right[1:]))))
    short = next((v for d in (1, 2, 4, 6) for v in [float(f"{theta:.{d}g}")] if abs(v / theta - 1) < _NEAR), theta)
    return None if short <= 1 or abs(short / own - 1) < CLEAR else short


_ESTIMATES: Mapping[str, Callable[[At, np.ndarray, np.ndarray], float | None]] = MappingProxyType(
    {"eps": _eps, "temperature": _temperature, "cap": _cap, "theta": _theta}
)


def one_factor(
    at: At, observed: np.ndarray, right: np.ndarray, noise: np.ndarray | None = None
) -> tuple[str, int] | None:
    """The one number that all values are times what they should be, in words, and how many bits it gives.

    Each value says between which two it lies: as far as its own cell and the stage's noise go, and then one rounding
    more, where it was stored first. None where there is no such number, or it may be 1. `noise`: the stage's, where
    that is known.
    """
    assert at.right is not None
    if noise is None:
        value = at.right(at)
        noise = (value.hi - value.lo) / 2
    y, wide = observed.astype(np.float64), float(np.vdot(right, right))
    if not wide or not y.any() or noise.shape != right.shape:
        return ("all values are 0", 0) if wide and not y.any() else None
    fitted, own = float(np.vdot(right, y)) / wide, _bits(right, observed)
    least, most = cell(observed)
    room = noise * abs(fitted) + TINY + U32 * np.abs(y)
    for again in (0.0, rounding_unit(observed.dtype)):
        e = room + again * np.abs(y)
        low, high = (float(edge[0]) for edge in interval(*(x.reshape(-1, 1) for x in (least - e, most + e, right))))
        if low <= high and (high < 1 - CLEAR or low > 1 + CLEAR):
            factor = shortest(low, high)
            for text, usual in _scales(at).items():
                if low <= usual <= high:
                    return text, _bits(right * usual, observed)
            bits = _bits(right * factor, observed)
            # In few bits most values may be either; then a factor explains no more than none.
            return (f"every value is {factor:.9g} times what it should be", bits) if bits >= own else None
    return None


def _bits(value: np.ndarray, observed: np.ndarray) -> int:
    return int(np.count_nonzero(round_once(value, observed.dtype) == observed))


def _scales(at: At) -> dict[str, float]:
    """By what factor scores are off whose scale goes by another of the model's sizes, and norms of another count."""
    if at.stage.noise is Noise.RMS_NORM:
        columns = len(at.params()[-1][1])
        return {norms.FEWER: (1 - 1 / columns) ** 0.5}
    scaling = at.options.get("scaling")
    if scaling is None:
        return {}
    sizes = at.oracle.sizes.items()
    return {f"the scale is 1/sqrt({name}), {size}, not 1/sqrt(head_dim)": size**-0.5 / scaling for name, size in sizes}
