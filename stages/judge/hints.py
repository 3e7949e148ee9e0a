"""Why a failing stage failed, from the shape of its error alone; true or absent, and never a verdict.

Each hint is a function of one `Case` that returns a sentence's end or None. Those that name elements or another
function come first: they hold only if that explains every element within rounding. The others say where the error is,
and name no step that the stage does not have.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import MappingProxyType

import numpy as np

from stages.judge.low_rank import explain_low_rank
from stages.oracle import bounds as noise
from stages.oracle.experts import admissible
from stages.oracle.verdict import STAGES, Oracle, judged_part
from stages.recipes.at import At
from stages.recipes.attention import SOFTMAX
from stages.recipes.catalogue import ways_of
from stages.recipes.elements import CLEAR, EVIDENT, interval, shortest
from stages.recipes.match import explain as ask
from stages.recipes.recipe import Class
from stages.spec.causal import up_to_query
from stages.spec.noise import Noise

# What is wrong, the value that gives, and where that function cancels how far a right one may err beside the bound.
Wrong = tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray]

# Wrong causal masks by the catalogue's words: how many keys beyond its own a query sees; None: all.
MASKS: Mapping[str, int | None] = MappingProxyType(
    {mod.words: mod.args["mask"] for mod in SOFTMAX.mods if "mask" in mod.args}
)

# A wrong value explained by another function is this many times nearer to that function than to the right one.
_NEARER = 4.0
# Or it lies within the bound of that function everywhere, and the error's RMS is this many times less.
_LESS = 1.5
# Axes longer than this are not searched for a permutation: the search is quadratic.
_LONGEST = 2048
# Axes along which positions of the sequence lie.
_POSITIONS = ("tokens", "queries")
# Axes that an oracle may speak of in parts.
_CHUNKED = ("rows", "vocab")
# An error so many bounds off is plain: one just beyond the bound has others of its kind beside it, within theirs.
_PLAIN = 64
# Of functions that all explain an error, those are told that leave no more than so many times the least.
_AS_GOOD = 1.2


@dataclass(frozen=True)
class Case:
    """A stage that failed: its oracle, what was observed, and what it would be with other weights of the model.

    `others` yields (what is wrong, value): a hypothesis that needs what the stage does not read. `start` is where the
    oracle's part of the whole result begins, along its rows or its vocabulary. `asked`: no recipe gives the stage.
    """

    oracle: Oracle
    observed: np.ndarray
    others: Callable[[], Iterable[Wrong]] = field(default=lambda: ())
    start: int = 0
    asked: bool = False

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

    @cached_property
    def plain(self) -> bool:
        """Whether the error is so far beyond the bound that what is within it was not a little less of the same."""
        exact = self.oracle.stage.noise is Noise.EXACT  # one rounding, and nothing may differ from it
        return exact or float((self.error / self.bound).max()) >= _PLAIN

    @property
    def axes(self) -> list[str]:
        """Names of the axes, as declared."""
        names = self.oracle.stage.shape.split()
        turned = self.oracle.options.get("transpose") and self.oracle.stage.name.startswith("final_")
        return names[::-1] if turned else names

    def axis(self, names: Iterable[str]) -> int | None:
        """Index of the first axis with one of `names`."""
        return next((i for i, name in enumerate(self.axes) if name in names), None)

    def index(self, axis: int, i: int) -> int:
        """Where the `i`-th slice of an axis is in the whole result."""
        return int(i) + (self.start if axis < len(self.axes) and self.axes[axis] in _CHUNKED else 0)

    def along(self, axis: int, x: np.ndarray) -> np.ndarray:
        """`x` as a matrix whose rows are the slices of `axis`."""
        return np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)

    def explained_by(self, value: np.ndarray, more: np.ndarray | float = 0.0) -> bool:
        """Whether every element is `value` within rounding, and much nearer to it than to the right value.

        `more` is what that function may err beside the bound.
        """
        if value.shape != self.got.shape or not np.isfinite(value).all():
            return False
        value = judged_part(self.oracle.stage, value)
        size = max(float(np.linalg.norm(self.value)), noise.TINY)
        scale = max(1.0, float(np.linalg.norm(value)) / size)
        # The bound is that of the right value; where this one is larger, so is its rounding: 64 u covers a softmax's.
        unit = 2 * noise.rounding_unit(self.observed.dtype) + 64 * noise.U32
        error = np.abs(self.got - value)
        if not (error <= 2 * scale * self.bound + unit * np.abs(value) + more).all():
            return False
        now, before = error / (self.bound + more), self.error / self.bound
        if now.max() * _NEARER <= before.max():
            return True
        # A fault little above the rounding to bfloat16 leaves that rounding, and less of it on the whole.
        rms_now, rms_before = (float(np.sqrt(np.mean(x * x))) for x in (now, before))
        return bool(now.max() <= 1) and rms_now * _LESS <= rms_before

    def shortened_by(self, value: np.ndarray, numbers: int = 1) -> bool:
        """Whether fitting `numbers` to reach `value` leaves surely less error, not just what was a little too much.

        Of normal errors the bits gained are the count times log2 of the ratio of their RMS; each number costs some.
        """
        counts = self.value != 0
        before, now = (
            float(np.linalg.norm((np.abs(self.got - x) / self.bound)[counts])) for x in (self.value, np.asarray(value))
        )
        bits = counts.sum() * np.log2(max(before, noise.TINY) / max(now, noise.TINY))
        return bool(bits >= EVIDENT * numbers)


def explain(case: Case) -> str | None:
    """The first hint that fits; None when none does."""
    if not case.got.size or case.got.shape != case.value.shape:
        return None
    if case.oracle.stage.noise is Noise.CHOICE:
        return chosen_otherwise(case)
    hints = HINTS if np.isfinite(case.got).all() else NONFINITE_HINTS
    with np.errstate(all="ignore"):
        return next((text for hint in hints for text in [hint(case)] if text is not None), None)


def chosen_otherwise(case: Case) -> str | None:
    """Another choice of experts: by a row of the catalogue, or the first token whose choice no rounding makes."""
    at = At(case.oracle)
    for way in ways_of(at, Class.OTHER):
        if np.array_equal(np.sort(way.value, axis=-1), np.sort(case.got, axis=-1)):
            return way.words
    probs, got = case.oracle.arguments[0], case.observed
    wrong = np.flatnonzero(~admissible(probs, got))
    if not len(wrong):
        return None
    token = int(wrong[0])
    odd, right = (sorted(set(x.tolist())) for x in (got[token], case.oracle.value[token].astype(int)))
    share = ", ".join(f"{probs[token, e]:.3g}" if 0 <= e < probs.shape[1] else "none" for e in odd)
    some = f"{len(wrong)} of {len(got)} tokens" if len(wrong) > 1 else "one token"
    return f"{some}, first token {token}: experts {odd} with probabilities {share}, where {right} are the likeliest"


def by_recipe(case: Case) -> str | None:
    """Another function, another number in it, or a few elements of its weight; it gives every element."""
    found = None if case.asked else ask(case.oracle, case.observed)
    return found.words if found is not None and found.kind is Class.OTHER else None


def masked_otherwise(case: Case) -> str | None:
    """A softmax that is right but for which keys it hides: those are read off what is 0."""
    if case.oracle.stage.noise is not Noise.SOFTMAX:
        return None
    window = case.oracle.stage.window
    causal = up_to_query(case.got, window)
    unknown = np.isnan(case.got).any(axis=-1) | (np.ptp(case.got, axis=-1) == 0)  # a query without keys: 0/0, or even
    small = case.value <= 2 * case.bound  # 0 for being small, not for being hidden
    shown = np.where(causal & small, causal, case.got != 0)
    if unknown.all() or (shown == causal)[~unknown].all():
        return None
    scores = np.where(shown, case.oracle.arguments[0].astype(np.float64), -np.inf)
    with np.errstate(invalid="ignore"):  # of a query without keys
        p = np.exp(scores - scores.max(axis=-1, keepdims=True))
    known = dataclasses.replace(case, observed=np.where(unknown[..., None], case.oracle.rounded, case.observed))
    value = np.where(unknown[..., None], case.value, p / p.sum(axis=-1, keepdims=True))
    return _mask_said(shown, causal, ~small, unknown, window) if known.explained_by(value) else None


def _mask_said(shown: np.ndarray, causal: np.ndarray, seen: np.ndarray, unknown: np.ndarray, right: int | None) -> str:
    """In which way a mask `[heads, queries, keys]` differs from the causal one, where that can be `seen`.

    `right`: of a layer that slides, its window.
    """
    queries, keys = causal.shape
    at = np.arange(queries)[:, None] + keys - queries - np.arange(keys)  # how far back each key is
    known = ~unknown[..., None] & (seen | ~causal) & np.ones_like(shown)
    window, first = int(np.where(known & shown, at, 0).max()) + 1, int(np.argmax((known & shown).any(axis=(0, 1))))
    other = f", where the model's is {right}" if right is not None else ""
    missing = {"the sliding window is missing: every key up to the query is seen": at >= 0}
    masks = {
        **(missing if right is not None else {}),
        **{text: np.ones(at.shape, bool) if ahead is None else at >= -ahead for text, ahead in MASKS.items()},
        f"the mask shows the last {window} keys alone: a window{other}": (at >= 0) & (at < window),
        f"the first {first} keys are hidden from all queries": (at >= 0) & (np.arange(keys) >= first),
    }
    found = next((text for text, mask in masks.items() if (shown == mask)[known].all()), None)
    if found is not None:
        return found
    head, query, key = (int(i) for i in np.argwhere(known & (shown != causal))[0])
    sees = "sees" if shown[head, query, key] else "does not see"
    return f"another mask: query {query} {sees} key {key} in head {head}"


def of_other_weights(case: Case) -> str | None:
    """What the stage would be of other weights of the model, or of other stages."""
    return first_fitting(case, case.others())


def first_fitting(case: Case, table: Iterable[Wrong]) -> str | None:
    """What explains the error best; with it what explains it as well, since nothing tells them apart."""
    left = {}
    with np.errstate(all="ignore"):
        for text, value, *error in table:
            wide = np.asarray(value, np.float64)
            if case.explained_by(wide, *error):
                left[text] = float(np.linalg.norm((case.got - wide) / case.bound))
    least = min(left.values(), default=0.0)
    return ", or ".join(text for text, norm in left.items() if norm <= _AS_GOOD * least) or None


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


def row_factor(case: Case) -> str | None:
    """Each slice along some axis is the right one times a number of its own, and some of these are surely not 1."""
    for axis in range(case.value.ndim):
        n = case.value.shape[axis]
        if n < 2 or case.value.size < 4 * n:  # a factor per element or two explains anything
            continue
        least, most = _factors(case, partial(case.along, axis))
        off = (most < 1 - CLEAR) | (least > 1 + CLEAR)
        if not ((least <= most).all() and off.sum() > 1):
            continue
        middle = np.where(np.isfinite(least + most), (least + most) / 2, 1.0)
        if case.shortened_by(case.value * middle.reshape([-1 if i == axis else 1 for i in range(case.value.ndim)]), n):
            low, high = (shortest(least[i], most[i]) for i in _extremes(least + most, off))
            what = ": its root mean square" if _is_of_norm(case, axis) else ""
            count = _name(case, axis) if off.all() else f"{off.sum()} of {n} {_name(case, axis)}"
            return f"{count} are off by a factor each, {low:.9g} to {high:.9g}{what}"
    return None


def _extremes(of: np.ndarray, among: np.ndarray) -> tuple[int, int]:
    """Where the least and the largest of some elements are."""
    places = np.flatnonzero(among)
    return int(places[np.argmin(of[places])]), int(places[np.argmax(of[places])])


def _is_of_norm(case: Case, axis: int) -> bool:
    return case.oracle.stage.noise is Noise.RMS_NORM and axis != case.value.ndim - 1


def _factors(case: Case, rows: Callable[[np.ndarray], np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Per row the factors that bring every element of the right values to the observed: least and most."""
    room = np.broadcast_to(case.oracle.room, case.value.shape)
    value, got, bound = (rows(x) for x in (case.value, case.got, room))
    squares = np.sum(value * value, axis=1, keepdims=True)
    fitted = np.where(squares > 0, np.sum(value * got, axis=1, keepdims=True) / np.where(squares > 0, squares, 1), 1.0)
    # A function times f rounds f times as much.
    room = bound * np.abs(fitted)
    least, most = interval((got - room).T, (got + room).T, value.T)
    # What was stored and then multiplied is rounded once more.
    room += noise.exact_bound(got, case.observed.dtype)
    again = interval((got - room).T, (got + room).T, value.T)
    return np.where(least <= most, least, again[0]), np.where(least <= most, most, again[1])


def one_wrong(case: Case) -> str | None:
    """A single wrong element, or all wrong ones in one slice of one axis while the others are right."""
    places = np.argwhere(case.wrong)
    what = "wrong" if case.plain else "beyond its bound"
    if case.value.size > 1 and len(places) == 1:
        at = [case.index(axis, i) for axis, i in enumerate(places[0])]
        return f"one element alone is {what}, at {at}" + (": is it corrupt?" if case.plain else "")
    for axis in range(case.value.ndim):
        first = places[0, axis] if len(places) else -1
        if case.value.shape[axis] > 2 and len(places) > 1 and (places[:, axis] == first).all():
            slice_ = f"{_name(case, axis, one=True)} {case.index(axis, first)}"
            return f"only {slice_} of {case.value.shape[axis]} is {what}"
    return None


def past_a_count(case: Case) -> str | None:
    """Right up to some token, wrong from it on."""
    wrong = _wrong_positions(case)
    if wrong is None or wrong.all() or not wrong.any() or not case.plain:
        return None
    first = int(np.argmax(wrong))
    if first < 2 or wrong.size - first < 2 or wrong[first:].mean() < 0.75:
        return None
    # Keys and values of earlier tokens are kept, and read by these two stages.
    cache = ": a cache that was cut or shifted?" if case.oracle.stage.name in ("attn_scores", "attention") else ""
    return f"right up to token {first - 1}, wrong from {first} on{cache}"


def turned_otherwise(case: Case) -> str | None:
    """Queries or keys turned by other angles than the tables': every pair keeps its length, and token 0 its place."""
    if case.oracle.stage.noise is not Noise.ROPE:
        return None
    got, value, bound = (_pairs(x) for x in (case.got, case.value, case.bound))
    room = np.sqrt((bound**2).sum(axis=0))
    lengths = [np.sqrt((x**2).sum(axis=0)) for x in (got, value)]
    if (np.abs(lengths[0] - lengths[1]) > room).any() or not case.plain:
        return None
    first = int(np.argmax(case.along(0, case.wrong).any(axis=1)))
    since = f" from token {first} on" if first else ""
    return f"turned by other angles than rope_cos and rope_sin say{since}; every pair keeps its length"


def _pairs(x: np.ndarray) -> np.ndarray:
    """Both members of each pair that RoPE turns, `[2, ..., head_dim / 2]`."""
    half = x.shape[-1] // 2
    return np.stack((x[..., :half], x[..., half:]))


def grows_with_position(case: Case) -> str | None:
    """The error grows in step with the position, in a stage that RoPE's angles are in."""
    axis = case.axis(_POSITIONS)
    if axis is None or case.value.shape[axis] < 4 or not _has_angles(case):
        return None
    rms = np.sqrt(np.mean(case.along(axis, case.error) ** 2, axis=1))
    at = np.arange(rms.size)
    if rms[-1] < 3 * rms[1] or rms[1:].min() <= 0 or rms[0] > rms[1:].min():
        return None
    wrong = np.asarray(case.along(case.value.ndim - 1, case.wrong).any(axis=1))
    if not (wrong[0] or wrong[len(wrong) // 2]):  # the first pair turns most
        return None
    # Of a quantity in step with t, log against log has slope 1; the first position has no logarithm.
    slope, _ = np.polyfit(np.log(at[1:]), np.log(rms[1:]), 1)
    if not 0.7 < slope < 1.3 or np.corrcoef(at, rms)[0, 1] < 0.9:
        return None
    return (
        "the error grows in step with the position, from none at token 0, as if RoPE's angles were multiplied by "
        "a number"
    )


def _has_angles(case: Case) -> bool:
    stage = case.oracle.stage
    return stage.noise in (Noise.ROPE, Noise.COS_SIN) or stage.name == "rope_angle"


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
    what = "wrong" if case.plain else "beyond their bound"
    return f"only heads {_listed(np.flatnonzero(wrong))} of {wrong.size} are {what}"


def low_rank(case: Case) -> str | None:
    """A product whose weight lacks a matrix of low rank: an adaptation."""
    return explain_low_rank(case.oracle, case.observed)


def beyond_float16(case: Case) -> str | None:
    """What is not finite is where a float16 overflows that another dtype would hold."""
    finite = np.isfinite(case.got)
    dtype = case.observed.dtype
    if np.array_equal(np.isfinite(case.oracle.rounded), finite):
        return f"the right result is beyond the range of {dtype.name} there"
    arguments = [a.astype(np.float16).astype(a.dtype) if a.dtype.kind != "i" else a for a in case.oracle.arguments]
    operands = np.isfinite(STAGES[case.oracle.stage.name](*arguments, **case.oracle.options))
    result = np.isfinite(case.value.astype(np.float16))
    for what, holds in {"an operand": operands, "the result": result, "either": operands & result}.items():
        if np.array_equal(holds, finite):
            return (
                f"not finite where {what} is beyond 65504, the range of float16: it was cast to float16, not to "
                "TF32 or bfloat16, which have float32's range"
            )
    return None


# In the order in which they are asked: what names elements or a function, then what names a place.
HINTS: tuple[Callable[[Case], str | None], ...] = (
    by_recipe,
    masked_otherwise,
    of_other_weights,
    permuted,
    low_rank,
    one_wrong,
    past_a_count,
    row_factor,
    grows_with_position,
    turned_otherwise,
    some_heads,
)
# Of values that are not all finite.
NONFINITE_HINTS: tuple[Callable[[Case], str | None], ...] = (masked_otherwise, beyond_float16)

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
