"""Why a failing stage failed, guessed from the shape of its error alone; a hint, never a verdict.

Each hint is a function of one `Case` that returns a sentence's end or None. Those that name another function come
first: they hold only if that function explains every element within rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from stages import noise
from stages.alternatives import (
    MISSING,
    REARRANGED,
    Wrong,
    with_parameters_rearranged,
    without_a_parameter,
)
from stages.noise import Noise
from stages.verdict import Oracle, judge, judged_part

# A wrong value explained by another function is this many times nearer to that function than to the right one.
_NEARER = 4.0
# Or it lies within the bound of that function everywhere, and the error's RMS is this many times less.
_LESS = 1.5
# Axes longer than this are not searched for a permutation: the search is quadratic.
_LONGEST = 2048
# Axes along which positions of the sequence lie.
_POSITIONS = ("tokens", "queries")


@dataclass(frozen=True)
class Case:
    """A stage that failed: its oracle, what was observed, and what it would be with other weights of the model.

    `others` yields (what is wrong, value): a hypothesis that needs weights the stage does not read.
    """

    oracle: Oracle
    observed: np.ndarray
    others: Callable[[], Iterable[Wrong]] = field(default=lambda: ())

    @cached_property
    def got(self) -> np.ndarray:
        return judged_part(self.oracle.stage, self.observed.astype(np.float64))

    @property
    def value(self) -> np.ndarray:
        return self.oracle.value

    @cached_property
    def error(self) -> np.ndarray:
        return np.abs(self.got - self.value)

    @cached_property
    def bound(self) -> np.ndarray:
        return np.maximum(np.broadcast_to(self.oracle.bound, self.value.shape), noise.TINY)

    @cached_property
    def wrong(self) -> np.ndarray:
        """Which elements are beyond their bound."""
        return self.error > self.bound

    @property
    def axes(self) -> list[str]:
        """Names of the axes, as declared."""
        names = self.oracle.stage.shape.split()
        turned = self.oracle.options.get("transpose") and self.oracle.stage.name.startswith("final_")
        return names[::-1] if turned else names

    def axis(self, names: Iterable[str]) -> int | None:
        """Index of the first axis with one of `names`."""
        return next((i for i, name in enumerate(self.axes) if name in names), None)

    def along(self, axis: int, x: np.ndarray) -> np.ndarray:
        """`x` as a matrix whose rows are the slices of `axis`."""
        return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)

    def explained_by(self, value: np.ndarray) -> bool:
        """Whether every element is `value` within rounding, and much nearer to it than to the right value."""
        if value.shape != self.got.shape or not np.isfinite(value).all():
            return False
        value = judged_part(self.oracle.stage, value)
        size = max(float(np.linalg.norm(self.value)), noise.TINY)
        scale = max(1.0, float(np.linalg.norm(value)) / size)
        # The bound is that of the right value; where this one is larger, so is its rounding: 64 u covers a softmax's.
        unit = 2 * noise.rounding_unit(self.observed.dtype) + 64 * noise.U32
        error = np.abs(self.got - value)
        if not (error <= 2 * scale * self.bound + unit * np.abs(value)).all():
            return False
        now, before = error / self.bound, self.error / self.bound
        if now.max() * _NEARER <= before.max():
            return True
        # A fault little above the rounding to bfloat16 leaves that rounding, and less of it on the whole.
        rms_now, rms_before = (float(np.sqrt(np.mean(x * x))) for x in (now, before))
        return bool(now.max() <= 1) and rms_now * _LESS <= rms_before


def explain(case: Case) -> str | None:
    """The first hint that fits; None when none does, or values are not finite."""
    if not case.got.size or not np.isfinite(case.got).all() or case.got.shape != case.value.shape:
        return None
    with np.errstate(all="ignore"):
        return next((text for hint in HINTS for text in [hint(case)] if text is not None), None)


def missing_term(case: Case) -> str | None:
    """A bias, a residual, a norm, its weight, the mask or the activation is not there, or another is in its place."""
    stage, arguments, options = case.oracle.stage, case.oracle.arguments, case.oracle.options
    if stage.identity:
        return None
    table = MISSING[stage.name](*arguments, **options) if stage.name in MISSING else iter(())
    return _first_fitting(case, _chained(table, without_a_parameter(stage, arguments, options)))


def rearranged(case: Case) -> str | None:
    """Right values in the wrong places: pairs for halves, heads dealt out wrongly, a transpose, swapped weights."""
    stage, arguments, options = case.oracle.stage, case.oracle.arguments, case.oracle.options
    if stage.identity:
        return None
    table = REARRANGED[stage.name](*arguments, **options) if stage.name in REARRANGED else iter(())
    return _first_fitting(case, _chained(table, with_parameters_rearranged(stage, arguments, options), case.others()))


def _chained(*tables: Iterable[Wrong]) -> Iterator[Wrong]:
    for table in tables:
        yield from table


def _first_fitting(case: Case, table: Iterable[Wrong]) -> str | None:
    return next((text for text, value in table if case.explained_by(np.asarray(value, np.float64))), None)


def permuted(case: Case) -> str | None:
    """Slices of one axis stand in another order: heads, tokens, columns."""
    shape = case.value.shape
    if len(shape) == 2 and shape[0] == shape[1] and case.explained_by(case.value.T):
        return "the values are transposed"
    for axis, n in enumerate(shape):
        if not 1 < n <= _LONGEST or case.value.size == n:
            continue
        order = _order(case.along(axis, case.value), case.along(axis, case.got))
        if order is not None and case.explained_by(np.take(case.value, order, axis)):
            moved = int(np.argmax(order != np.arange(n)))
            one = _name(case, axis, one=True)
            return f"{_name(case, axis)} are in another order: {one} {moved} holds what belongs to {int(order[moved])}"
    return None


def _order(value: np.ndarray, got: np.ndarray) -> np.ndarray | None:
    """For each row of `got` the row of `value` that it is, if that is another one and no row is there twice."""
    norms = np.linalg.norm(value, axis=1)
    # Nearest: |g - v|^2 is least where g v - |v|^2 / 2 is largest.
    order = np.argmax(got @ value.T - norms**2 / 2, axis=1)
    is_permutation = np.unique(order).size == order.size
    return order if is_permutation and (order != np.arange(order.size)).any() else None


def other_eps(case: Case) -> str | None:
    """A norm with another of the usual epsilons, or with the root's argument otherwise."""
    stage, options = case.oracle.stage, case.oracle.options
    if stage.noise is not Noise.RMS_NORM:
        return None
    for eps in (0.0, *(10.0**-n for n in range(12, 2, -1))):
        if not np.isclose(eps, options["eps"], rtol=1e-3, atol=0) and _right_with(case, eps=eps):
            return f"as if eps were {eps:g}, not {options['eps']:g}"
    return None


def other_theta(case: Case) -> str | None:
    """Inverse frequencies of another rope_theta."""
    options = case.oracle.options
    if case.oracle.stage.name != "inv_freq" or case.got.size < 2 or (case.got[1:] <= 0).any():
        return None
    ratios = np.log(case.got[1:]) / np.log(case.value[1:])
    theta = float(np.exp(np.log(options["rope_theta"]) * np.median(ratios)))
    short = (float(f"{theta:.{digits}g}") for digits in (1, 2, 4, 6, 9))
    fitting = next((value for value in short if _explains_theta(case, value)), None)
    return None if fitting is None else f"as if rope_theta were {fitting:.9g}, not {options['rope_theta']:.9g}"


def _explains_theta(case: Case, theta: float) -> bool:
    if theta <= 1:
        return False
    return _right_with(case, rope_theta=theta)


def _right_with(case: Case, **options: float) -> bool:
    """Whether the stage would be right if its options were others, by the bound of that function."""
    other = case.oracle.of(case.oracle.arguments, {**case.oracle.options, **options})
    return judge(other, case.observed)[0].passes


def constant_factor(case: Case) -> str | None:
    """All values are the right ones times one number."""
    factor = _fitted(case.value.reshape(1, -1), case.got.reshape(1, -1))[0]
    if not case.explained_by(case.value * factor):
        return None
    if not factor:
        return "all values are 0"
    scaling = case.oracle.options.get("scaling")
    if scaling and np.isclose(factor, 1 / scaling, rtol=1e-3):
        return "the scale 1/sqrt(head_dim) is missing"
    if scaling and np.isclose(factor, scaling, rtol=1e-3):
        return "the scale 1/sqrt(head_dim) is there twice"
    return f"every value is {factor:.6g} times what it should be"


def row_factor(case: Case) -> str | None:
    """Each slice along some axis is the right one times a number of its own."""
    for axis in range(case.value.ndim):
        n = case.value.shape[axis]
        if n < 2 or case.value.size < 4 * n:  # a factor per element or two explains anything
            continue
        value, got = case.along(axis, case.value), case.along(axis, case.got)
        factors = _fitted(value, got)
        shape = [n if i == axis else 1 for i in range(case.value.ndim)]
        if case.explained_by(case.value * factors.reshape(shape)):
            low, high = factors.min(), factors.max()
            return f"{_name(case, axis)} are off by a factor each, {low:.4g} to {high:.4g}: a norm or a scale"
    return None


def _fitted(value: np.ndarray, got: np.ndarray) -> np.ndarray:
    """Per row the factor that brings `value` nearest to `got`, seen from the largest values."""
    squares = np.sum(value * value, axis=1)
    return np.where(squares > 0, np.sum(value * got, axis=1) / np.where(squares > 0, squares, 1), 1.0)


def one_wrong(case: Case) -> str | None:
    """A single wrong element, or all wrong ones in one slice of one axis while the others are right."""
    places = np.argwhere(case.wrong)
    if case.value.size > 1 and len(places) == 1:
        return f"one element alone is wrong, at {[int(i) for i in places[0]]}: is it corrupt?"
    for axis in range(case.value.ndim):
        first = places[0, axis] if len(places) else -1
        if case.value.shape[axis] > 2 and len(places) > 1 and (places[:, axis] == first).all():
            return f"only {_name(case, axis, one=True)} {first} of {case.value.shape[axis]} is wrong" + _corrupt(
                case, axis, int(first)
            )
    return None


def _corrupt(case: Case, axis: int, column: int) -> str:
    """The weight's element that would explain one wrong column of a product, in words; or nothing."""
    stage, arguments = case.oracle.stage, case.oracle.arguments
    if stage.noise is not Noise.PRODUCT or case.value.ndim != 2 or axis != 1 or len(stage.params) != 1:
        return ": is a row of its weight corrupt?" if stage.noise is Noise.PRODUCT and axis == 1 else ""
    x, weight = arguments[0].astype(np.float64), arguments[1]
    if x.ndim != 2 or weight.ndim != 2 or weight.shape != (case.value.shape[1], x.shape[1]) or len(x) < 2:
        return ": is a row of its weight corrupt?"
    error = (case.got - case.value)[:, column]
    norms = np.maximum(np.linalg.norm(x, axis=0), noise.TINY)
    k = int(np.argmax(np.abs(error @ x) / norms))
    change = float(error @ x[:, k] / norms[k] ** 2)
    if (np.abs(error - change * x[:, k]) > 2 * case.bound[:, column]).any():
        return ": is a row of its weight corrupt?"
    was = float(weight[column, k])
    return f": as if {stage.params[0]}[{column}, {k}] were {was + change:.6g}, not {was:.6g}"


def past_a_count(case: Case) -> str | None:
    """Right up to some token, wrong from it on: a sliding window, or a cache that was cut or shifted."""
    wrong = _wrong_positions(case)
    if wrong is None or wrong.all() or not wrong.any():
        return None
    first = int(np.argmax(wrong))
    if first < 2 or wrong.size - first < 2 or wrong[first:].mean() < 0.75:
        return None
    return f"right up to token {first - 1}, wrong from {first} on: a sliding window, or a cache?"


def after_token_0(case: Case) -> str | None:
    """Right at token 0, where RoPE turns nothing and the mask leaves one key, and wrong after it."""
    wrong = _wrong_positions(case)
    if wrong is None or wrong.size < 3 or wrong[0] or wrong[1:].mean() < 0.75:
        return None
    return "right at token 0 and wrong after it: RoPE or the mask"


def grows_with_position(case: Case) -> str | None:
    """The error grows in step with the position: an angle of RoPE."""
    axis = case.axis(_POSITIONS)
    if axis is None or case.value.shape[axis] < 4:
        return None
    rms = np.sqrt(np.mean(case.along(axis, case.error) ** 2, axis=1))
    at = np.arange(rms.size)
    if rms[-1] < 3 * rms[1] or rms[1:].min() <= 0 or rms[0] > rms[1:].min():
        return None
    # Of a quantity in step with t, log against log has slope 1; the first position has no logarithm.
    slope, _ = np.polyfit(np.log(at[1:]), np.log(rms[1:]), 1)
    if not 0.7 < slope < 1.3 or np.corrcoef(at, rms)[0, 1] < 0.9:
        return None
    return "the error grows in step with the position, from none at token 0: an angle of RoPE (theta, scaling)"


def _wrong_positions(case: Case) -> np.ndarray | None:
    axis = case.axis(_POSITIONS)
    return None if axis is None else np.any(case.along(axis, case.wrong), axis=1)


def some_heads(case: Case) -> str | None:
    """Some heads are wrong and others right."""
    axis = case.axis(("heads", "kv_heads"))
    if axis is None:
        return None
    wrong = case.along(axis, case.wrong).any(axis=1)
    if wrong.all() or not wrong.any():
        return None
    return f"only heads {_listed(np.flatnonzero(wrong))} of {wrong.size} are wrong"


# In the order in which they are asked: what names a function, then what names a place.
HINTS: tuple[Callable[[Case], str | None], ...] = (
    missing_term,
    rearranged,
    other_eps,
    other_theta,
    constant_factor,
    permuted,
    one_wrong,
    past_a_count,
    row_factor,
    grows_with_position,
    after_token_0,
    some_heads,
)

# An axis as declared -> one of its slices, and several; any other is a column.
_NAMES: Mapping[str, tuple[str, str]] = {
    "heads": ("head", "heads"),
    "kv_heads": ("key/value head", "key/value heads"),
    "tokens": ("token", "tokens"),
    "queries": ("query", "queries"),
    "keys": ("key", "keys"),
    "rows": ("row", "rows"),
    "frequencies": ("frequency", "frequencies"),
}


def _name(case: Case, axis: int, *, one: bool = False) -> str:
    name = case.axes[axis] if axis < len(case.axes) else ""
    return _NAMES.get(name, ("column", "columns"))[0 if one else 1]


def _listed(indices: np.ndarray, limit: int = 8) -> str:
    text = ", ".join(str(int(i)) for i in indices[:limit])
    return text + (", ..." if indices.size > limit else "")
