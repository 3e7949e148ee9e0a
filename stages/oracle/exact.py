"""Ziv's test: which float64 results can be rounded, and the exact result of those that cannot.

A stage's float64 value T lies within E of the real number that its stored inputs define, whoever computed it. Where
T - E and T + E round alike, that is the rounding of the real number; the rest is computed again without error, here,
for every backend. Rounded results are thus unique, and equal between backends. A. Ziv, ACM TOMS 17 (1991) 410.

Each E has its derivation beside it; docs/findings/precision.md has what was seen. u is 2^-53. Elementary functions
are taken to be within 8 u of the right value, four times what the libraries promise or were seen to do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from types import MappingProxyType
from typing import Any

import mpmath
import numpy as np

from stages.oracle import bounds as noise
from stages.oracle import components as reference
from stages.oracle import decoder, experts
from stages.oracle import router as reference_router
from stages.oracle.bounds import TINY
from stages.oracle.rounding import round_once
from stages.spec.forward import DECLARED
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY
from stages.spec.router import ROUTER

# Unit roundoff of float64.
U64 = 2.0**-53
# Terms of sums that are held at a time, as Python floats.
_TERMS = 1 << 20
# Bits that an undecided elementary function is taken to, one after the other. Algebraic numbers alone can be equal
# to a midpoint; what still looks like one after the last is taken for one.
_BITS = (128, 256, 512, 1024, 2048)

Places = tuple[np.ndarray, ...]  # as np.nonzero gives them

NOISE: Mapping[str, Noise] = MappingProxyType(
    {s.function: s.noise for s in (*REPLAY.values(), *ROUTER.values(), *DECLARED.values())}
)


@dataclass(frozen=True)
class Kind:
    """One noise kind's bound on the error of a float64 result, and its results without any.

    `error(value, dtype, *operands)` broadcasts against `value`; infinite where a rounding inside the stage is itself
    undecided. `exact(places, dtype, *operands)` gives the correctly rounded results at `places`.
    """

    error: Callable[..., np.ndarray]
    exact: Callable[..., np.ndarray]


@dataclass(frozen=True)
class Decided:
    """A stage's correctly rounded result; of its elements, how many Ziv's test left open, how many were computed
    again, and how many of these the float64 value alone would have rounded the other way."""

    array: np.ndarray
    flagged: int = 0
    recomputed: int = 0
    corrected: int = 0


def decide(
    name: str, value: np.ndarray, arguments: Sequence[np.ndarray], options: Mapping[str, Any], dtype: np.dtype
) -> Decided:
    """The correctly rounded result of stage `name`, from its float64 `value` and its arguments as stored."""
    if NOISE[name] is Noise.EXACT:
        # One operation on numbers of 24 bits at most: float64 is wide enough to round it twice without harm
        # (S. Figueroa, When is double rounding innocuous?, 1995).
        return Decided(round_once(value, dtype))
    kind, operands = KINDS[NOISE[name]], _operands(name, arguments, options)
    with np.errstate(all="ignore"):  # infinities and NaN pass through
        error = kind.error(value, dtype, *operands)
        low, high = round_once(value - error, dtype), round_once(value + error, dtype)
        places = np.nonzero(((low != high) & np.isfinite(value)) | np.isposinf(error))
        again = kind.exact(places, dtype, *operands) if places[0].size else np.empty(0, dtype)
        corrected = int(np.count_nonzero(again != round_once(value[places], dtype)))
        low[places] = again
    return Decided(plain(low), places[0].size, again.size, corrected)


def tie_band(
    name: str, value: np.ndarray, arguments: Sequence[np.ndarray], options: Mapping[str, Any], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
    """The least and the largest result that rounding another float64 value of stage `name` once can give.

    The other one lies, as `value` does, within E of the real number. Where a rounding inside the stage is undecided,
    anything is possible as far as E says.
    """
    if NOISE[name] is Noise.EXACT:
        rounded = round_once(value, dtype)
        return rounded, rounded
    kind, operands = KINDS[NOISE[name]], _operands(name, arguments, options)
    with np.errstate(all="ignore"):
        error = 2 * kind.error(value, dtype, *operands)
        return round_once(value - error, dtype), round_once(value + error, dtype)


def plain(array: np.ndarray) -> np.ndarray:
    """`array` with one zero and one NaN: the order of a sum decides the sign of its zero, the machine a NaN's bits."""
    array[array == 0] = 0
    if not np.isfinite(array).all():
        array[np.isnan(array)] = np.nan
    return array


def _operands(name: str, arguments: Sequence[np.ndarray], options: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the bound and the exact result of a stage are computed from."""
    tables = (OPERANDS, reference.OPERANDS, decoder.OPERANDS, experts.OPERANDS, reference_router.OPERANDS)
    table = next((found[name] for found in tables if name in found), None)
    return tuple(arguments) if table is None else table(*arguments, **options)


OPERANDS: Mapping[str, Callable[..., tuple[Any, ...]]] = MappingProxyType(
    {
        "inv_freq": lambda positions, **options: (positions, options),
        "rope_cos": lambda angle, *, attention_scaling, dtype: (angle, attention_scaling, "cos"),
        "rope_sin": lambda angle, *, attention_scaling, dtype: (angle, attention_scaling, "sin"),
        "attn_norm": lambda x, weight, *, eps: (x, weight, eps),
        "ffn_norm": lambda x, weight, *, eps: (x, weight, eps),
        "final_norm": lambda x, weight, *, eps: (x, weight, eps),
        "q_norm": lambda qkv, weight, *, heads, kv_heads, head_dim, eps: (
            decoder._queries(qkv, heads, head_dim),
            weight,
            eps,
        ),
        "k_norm": lambda qkv, weight, *, heads, kv_heads, head_dim, eps: (
            decoder._keys(qkv, heads, kv_heads, head_dim),
            weight,
            eps,
        ),
        "router_weights": lambda probs, topk, *, renormalised, dtype: (
            np.take_along_axis(probs, topk.astype(np.int64), axis=-1),
            renormalised,
        ),
        "shared_weight": lambda score: (score,),
    }
)


# -- sums of products ---------------------------------------------------------------------------------------------


def product_error(value: np.ndarray, dtype: np.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(K+1) u |a_i|_2 |b_j|_2, for `a @ b` of float32 numbers over length K.

    Products of 24-bit numbers are exact; K - 1 additions in any order, fused or not, err by gamma_{K-1} |a_i||b_j|
    (Higham, eq. 3.5), which Cauchy and Schwarz bound by the norms. Two spare u cover gamma and the norms' own error.
    """
    rows, columns = _norm(a, -1)[..., :, None], _norm(b, -2)[..., None, :]
    error = (a.shape[-1] + 1) * U64 * rows * columns
    if ((np.abs(a) < TINY) & (a != 0)).any():  # a rounded factor that XLA flushes, of U * S
        error = error + TINY * np.abs(b).sum(axis=-2, dtype=np.float64)[..., None, :]
    return error


def product_exact(places: Places, dtype: np.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Elements of `a @ b`."""
    return _rounded_sums(_terms(places, a, b), dtype)


def weighted_error(value: np.ndarray, dtype: np.dtype, p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """As `product_error`, head by head; value `[rows, heads * dim]`."""
    error = product_error(value, dtype, p, v)
    return error.swapaxes(0, 1).reshape(value.shape)


def weighted_exact(places: Places, dtype: np.dtype, p: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Elements of `p @ v`, heads joined."""
    row, column = places
    head, of_head = np.divmod(column, v.shape[-1])
    return product_exact((head, row, of_head), dtype, p, v)


def scores_error(
    value: np.ndarray, dtype: np.dtype, q: np.ndarray, k: np.ndarray, scale: float, _: np.dtype
) -> np.ndarray:
    """float32: the product's E times the scale, and u of the result. Narrower: the rounding before it decides."""
    error = product_error(value, dtype, q, k)
    if dtype == np.float32:
        return error * np.float64(np.float32(scale)) * (1 + 4 * U64) + 2 * U64 * np.abs(value)
    return _undecided(q.astype(np.float64) @ k.astype(np.float64), error, dtype)


def scores_exact(
    places: Places, dtype: np.dtype, q: np.ndarray, k: np.ndarray, scale: float, _: np.dtype
) -> np.ndarray:
    """Elements of `(q @ k) * scale`, the product rounded to a dtype narrower than float32."""
    factor = np.float32(scale)
    if dtype == np.float32:
        sums = [_exact_sum(row) * Fraction(float(factor)) for rows in _terms(places, q, k) for row in rows.tolist()]
        return round_once(np.array([_to_odd(x) for x in sums]), dtype)
    return round_once(_rounded_sums(_terms(places, q, k), dtype).astype(np.float64) * factor, dtype)


def _norm(x: np.ndarray, axis: int) -> np.ndarray:
    """Euclidean norms along `axis`, in float64, not too small by more than 2^-50 of themselves."""
    rows = x.swapaxes(axis, -1)
    # A large weight is not widened for this: float32 errs by gamma_K, which is added, while no square is near its ends.
    squares = np.einsum("...k,...k->...", rows, rows).astype(np.float64)
    if squares.size and squares.min() > 1e-25 and squares.max() < 1e37:
        return np.sqrt(squares) * (1 + 2 * x.shape[axis] * noise.U32)
    wide = rows.astype(np.float64)
    return np.sqrt(np.sum(wide * wide, axis=-1))


def _terms(places: Places, a: np.ndarray, b: np.ndarray) -> list[np.ndarray]:
    """The K products, exact in float64, of each element of `a @ b` at `places`: some rows of them at a time."""
    *lead, row, column = places
    turned, step = b.swapaxes(-1, -2), max(1, _TERMS // a.shape[-1])
    blocks = []
    for at in range(0, row.size, step):
        part = slice(at, at + step)
        first = tuple(x[part] for x in lead)
        blocks.append(a[(*first, row[part])].astype(np.float64) * turned[(*first, column[part])])
    return blocks


def _rounded_sums(blocks: Sequence[np.ndarray], dtype: np.dtype) -> np.ndarray:
    """The sum of each row of exact terms, rounded to `dtype` once."""
    return np.concatenate([_rounded_sum(rows, dtype) for rows in blocks])


def _rounded_sum(terms: np.ndarray, dtype: np.dtype) -> np.ndarray:
    rows = terms.tolist()
    sums = np.array([math.fsum(row) for row in rows])  # correctly rounded to float64
    out = round_once(sums, dtype)
    below, above = (round_once(np.nextafter(sums, end), dtype) for end in (-np.inf, np.inf))
    for i in np.flatnonzero(below != above):  # a midpoint of `dtype`: the side is in what fsum rounded away
        rest = math.fsum([*rows[i], -sums[i]])
        if rest:
            out[i] = above[i] if rest > 0 else below[i]
    return out


def _exact_sum(terms: Sequence[float]) -> Fraction:
    """The sum without error, as parts of 53 bits each."""
    total, left = Fraction(0), list(terms)
    while part := math.fsum(left):
        total += Fraction(part)
        left.append(-part)
    return total


# -- sums, norms, rotations -----------------------------------------------------------------------------------------


def ratio_error(value: np.ndarray, dtype: np.dtype, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """gamma_n of both sums, amplified by their cancellation, and u for the quotient; infinite if all digits cancel."""
    worst = 4 * U64
    for x in (numerator, denominator):
        wide = x.astype(np.float64)
        worst += 2 * x.size * U64 * np.abs(wide).sum() / np.abs(wide.sum())
    return np.where(worst < 0.25, 2 * worst * np.abs(value), np.inf)


def ratio_exact(places: Places, dtype: np.dtype, numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """The quotient of the two sums."""
    if not (np.isfinite(numerator).all() and np.isfinite(denominator).all()):
        return np.array([np.nan], dtype)
    top, bottom = (_exact_sum(x.astype(np.float64).tolist()) for x in (numerator, denominator))
    if bottom == 0:
        return np.array([np.copysign(np.inf, float(top)) if top else np.nan], dtype)
    return round_once(np.array([_to_odd(top / bottom)]), dtype)


def norm_error(value: np.ndarray, dtype: np.dtype, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """(K/2 + 24) u |r|. Narrower than float32, the rounding before the weight decides.

    The mean of exact squares and eps err by K + 2 u, which the root halves; root, quotient (or rsqrt and product)
    and weight take 8 u together, a mean by a rounded 1/K one more.
    """
    unit = (x.shape[-1] / 2 + 24) * U64
    if dtype == np.float32:
        return unit * np.abs(value)
    normed = decoder._normed(x, eps)
    return _undecided(normed, unit * np.abs(normed), dtype)


def norm_exact(places: Places, dtype: np.dtype, x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Elements of `x / sqrt(mean(x^2) + eps) * weight`, rounded before the weight if narrower than float32."""
    means: dict[tuple[int, ...], Fraction] = {}
    out = []
    for place in zip(*(axis.tolist() for axis in places), strict=True):
        if place[:-1] not in means:
            row = x[place[:-1]].astype(np.float64)
            means[place[:-1]] = _exact_sum((row * row).tolist()) / row.size + Fraction(eps)
        mean, factor, scale = means[place[:-1]], float(x[place]), float(weight[place[-1]])
        if dtype == np.float32:
            out.append(_settled(partial(_over_root, factor * scale, mean), dtype))
        else:
            normed = _settled(partial(_over_root, factor, mean), dtype)
            out.append(round_once(np.float64(normed) * np.array([scale]), dtype)[0])
    return np.array(out, dtype)


def _over_root(x: float, square: Fraction) -> Any:
    return mpmath.mpf(x) / mpmath.sqrt(mpmath.mpf(square.numerator) / square.denominator)


def rope_error(value: np.ndarray, dtype: np.dtype, direct: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """float32: two exact products, one addition: u |r|. Narrower: exact, but for products that XLA flushes."""
    if dtype == np.float32:
        return 2 * U64 * np.abs(value)
    flushed = ((np.abs(direct) < 2 * TINY) & (direct != 0)) | ((np.abs(turned) < 2 * TINY) & (turned != 0))
    return np.where(flushed, np.inf, 0.0)


def rope_exact(places: Places, dtype: np.dtype, direct: np.ndarray, turned: np.ndarray) -> np.ndarray:
    """Elements of `direct + turned`, each rounded first if narrower than float32."""
    pair = np.stack((direct[places], turned[places]), axis=-1)
    return _rounded_sum(pair if dtype == np.float32 else round_once(pair, dtype).astype(np.float64), dtype)


def _undecided(inner: np.ndarray, error: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Infinite where a rounding inside the stage may go either way, on this machine or another backend's; else 0.

    `inner` and the backend's own lie each within `error` of the right value; XLA flushes what is rounded below 2^-126.
    """
    open_ = round_once(inner - 2 * error, dtype) != round_once(inner + 2 * error, dtype)
    return np.where(open_ | ((np.abs(inner) < 2 * TINY) & (inner != 0)), np.inf, 0.0)


# -- elementary functions ---------------------------------------------------------------------------------------------


def softmax_error(value: np.ndarray, dtype: np.dtype, scores: np.ndarray) -> np.ndarray:
    """u p (|s - max| + mean of |s - max| under p + n + 32).

    s - max is off by u |s - max|, exp by 8 u more; the sum of n such terms by their mean under p and gamma_n; and
    the quotient.
    """
    below = np.max(scores, axis=-1, keepdims=True) - scores
    below = np.where(np.isfinite(below), below, 0.0)
    mean = np.sum(value * below, axis=-1, keepdims=True)
    return U64 * np.abs(value) * (below + 1.01 * mean + scores.shape[-1] + 32)


def softmax_exact(places: Places, dtype: np.dtype, scores: np.ndarray) -> np.ndarray:
    """Elements of softmax over the last axis; a masked score is -inf."""
    rows = (scores[place[:-1]].tolist() for place in zip(*places, strict=True))
    found = [_settled(partial(_probability, row, at), dtype) for row, at in zip(rows, places[-1].tolist(), strict=True)]
    return np.array(found, dtype)


def _probability(scores: list[float], at: int) -> Any:
    top = mpmath.mpf(max(scores))
    terms = [mpmath.exp(mpmath.mpf(s) - top) for s in scores]  # exp(-inf) is 0
    return terms[at] / mpmath.fsum(terms)


def silu_error(value: np.ndarray, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    """32 u |r|: exp within 8 u, 1 + exp, the quotient."""
    return 32 * U64 * np.abs(value)


def silu_exact(places: Places, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    """Elements of `x / (1 + exp(-x))`."""
    return np.array([_settled(partial(_silu, number), dtype) for number in x[places].tolist()], dtype)


def _silu(x: float) -> Any:
    return mpmath.mpf(x) / (1 + mpmath.exp(-mpmath.mpf(x)))


def sigmoid_error(value: np.ndarray, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    """32 u |r|: exp within 8 u, 1 + exp, the quotient."""
    return 32 * U64 * np.abs(value)


def sigmoid_exact(places: Places, dtype: np.dtype, x: np.ndarray) -> np.ndarray:
    """Elements of `1 / (1 + exp(-x))`."""
    return np.array([_settled(partial(_sigmoid, number), dtype) for number in x[places].tolist()], dtype)


def _sigmoid(x: float) -> Any:
    return 1 / (1 + mpmath.exp(-mpmath.mpf(x)))


def shares_error(value: np.ndarray, dtype: np.dtype, probs: np.ndarray, renormalised: bool) -> np.ndarray:
    """(k + 4) u |r| for the sum of k positive numbers and the quotient; without them it is a copy."""
    return (probs.shape[-1] + 4) * U64 * np.abs(value) if renormalised else np.zeros(value.shape)


def shares_exact(places: Places, dtype: np.dtype, probs: np.ndarray, renormalised: bool) -> np.ndarray:
    """Elements of the probabilities over their sum."""
    found = []
    for token, place in zip(*(axis.tolist() for axis in places), strict=True):
        row = [Fraction(float(p)) for p in probs[token]]
        total = sum(row) if renormalised else Fraction(1)
        found.append(_to_odd(row[place] / total) if total else np.nan)
    return round_once(np.array(found), dtype)


def experts_error(value: np.ndarray, dtype: np.dtype, factors: noise.ExpertFactors) -> np.ndarray:
    """`product_error` of each expert's rows."""
    out = np.zeros(value.shape)
    for token, place, x, w in factors:
        out[token, place] = product_error(value[token, place], dtype, x, w)
    return out


def experts_exact(places: Places, dtype: np.dtype, factors: noise.ExpertFactors) -> np.ndarray:
    """Elements of each expert's product."""
    at: dict[tuple[int, int], tuple[int, int]] = {}
    for number, (token, place, _, _) in enumerate(factors):
        at |= {pair: (number, row) for row, pair in enumerate(zip(token.tolist(), place.tolist(), strict=True))}
    out = np.empty(places[0].size, dtype)
    for index, (token, place, column) in enumerate(zip(*(axis.tolist() for axis in places), strict=True)):
        number, row = at[token, place]
        _, _, x, w = factors[number]
        out[index] = product_exact((np.array([row]), np.array([column])), dtype, x, w)[0]
    return out


def combined_error(value: np.ndarray, dtype: np.dtype, terms: np.ndarray, _: np.dtype) -> np.ndarray:
    """(k + 1) u sum |terms|: products of two numbers of 24 bits are exact."""
    return (terms.shape[1] + 1) * U64 * np.abs(terms).sum(axis=1)


def combined_exact(places: Places, dtype: np.dtype, terms: np.ndarray, _: np.dtype) -> np.ndarray:
    """Elements of the sum over the terms."""
    token, column = places
    return _rounded_sum(terms[token, :, column], dtype)


def cos_sin_error(value: np.ndarray, dtype: np.dtype, angle: np.ndarray, scale: float, which: str) -> np.ndarray:
    """16 u |r| where the angle needs no reduction, below 3/4; else 16 u of the largest value, and 2 u for the scale.

    A library that reduces the angle in few bits is right to some u of 1, not of a result near a zero.
    """
    small = np.abs(angle) < 0.75
    return 16 * U64 * np.where(small, np.abs(value), abs(scale)) + 2 * U64 * np.abs(value)


def cos_sin_exact(places: Places, dtype: np.dtype, angle: np.ndarray, scale: float, which: str) -> np.ndarray:
    """Elements of `cos(angle) * scale` or `sin(angle) * scale`."""
    function = {"cos": mpmath.cos, "sin": mpmath.sin}[which]
    numbers = angle[places].astype(np.float64).tolist()
    return np.array([_settled(partial(_scaled, function, x, scale), dtype) for x in numbers], dtype)


def _scaled(function: Callable[[Any], Any], x: float, scale: float) -> Any:
    return function(mpmath.mpf(x)) * mpmath.mpf(scale)


def inv_freq_error(value: np.ndarray, dtype: np.dtype, positions: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """64 u |r|: a power within 8 u, dynamic's theta with another, and up to ten operations on positive numbers.

    llama3's share is a difference: its minuend, high / (high - low) at most where it blends, errs by 16 u of itself,
    and goes into the result with f - f/factor, f at most.
    """
    error = 64 * U64 * np.abs(value)
    if options["rope_type"] != "llama3":
        return error
    rope = dict(options["rope_parameters"])
    high, low = rope["high_freq_factor"], rope["low_freq_factor"]
    return error * (1 + rope["factor"] * high / (high - low))


def inv_freq_exact(places: Places, dtype: np.dtype, positions: np.ndarray, options: Mapping[str, Any]) -> np.ndarray:
    """Elements of `decoder.inv_freq`, whose float32 exponents, theta and factors are part of its meaning."""
    rope, head_dim = dict(options["rope_parameters"]), options["head_dim"]
    exponents = (np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)).astype(np.float64)
    theta, rope_type = float(np.float32(options["rope_theta"])), options["rope_type"]
    factor = mpmath.mpf(rope.get("factor", 1.0))
    kept, divisors = np.zeros(exponents.size), np.ones(exponents.size)
    if rope_type == "yarn":
        kept = decoder._yarn_kept(head_dim, options["rope_theta"], rope).astype(np.float64)
    if rope_type == "longrope":
        divisors = decoder._longrope_factors(positions, rope).astype(np.float64)

    def base() -> Any:
        if rope_type != "dynamic":
            return mpmath.mpf(theta)
        original = rope["original_max_position_embeddings"]
        stretch = 1 + factor * max(int(positions.max()) + 1 - original, 0) / original
        return theta * stretch ** mpmath.mpf(head_dim / (head_dim - 2))

    def frequency(at: int) -> Any:
        power = base() ** -mpmath.mpf(exponents[at])
        if rope_type == "linear":
            return power / mpmath.mpf(float(np.float32(rope["factor"])))
        share = mpmath.mpf(kept[at])
        if rope_type == "llama3":
            low, high = mpmath.mpf(rope["low_freq_factor"]), mpmath.mpf(rope["high_freq_factor"])
            turns = rope["original_max_position_embeddings"] * power / (2 * mpmath.mpf(math.pi))
            share = min(max((turns - low) / (high - low), mpmath.mpf(0)), mpmath.mpf(1))
        if rope_type in ("yarn", "llama3"):
            return power / factor * (1 - share) + power * share
        return power / mpmath.mpf(divisors[at])

    return np.array([_settled(partial(frequency, at), dtype) for at in places[0].tolist()], dtype)


def _settled(function: Callable[[], Any], dtype: np.dtype) -> Any:
    """What `function` gives, in as many bits as its rounding to `dtype` takes.

    It may lose 16 of its working bits: 65,000 operations without cancellation.
    """
    for bits in _BITS:
        with mpmath.workprec(bits):
            value = function()
            margin = abs(value) * mpmath.ldexp(1, 16 - bits)
            ends = np.array([_to_odd(_fraction(value - margin)), _to_odd(_fraction(value + margin))])
        low, high = round_once(ends, dtype)
        if low == high:
            return low
    with mpmath.workprec(bits - 32):
        return round_once(np.array([_to_odd(_fraction(+value))]), dtype)[0]


def _fraction(x: Any) -> Fraction:
    """`x` without error; what is far below all of float64's numbers, exp(-1e9) say, as something still below them."""
    sign = int(mpmath.sign(x))
    if x and mpmath.mag(x) < -2000:
        return Fraction(sign, 2**2000)
    mantissa, exponent = x.man_exp  # of the absolute value
    return sign * Fraction(int(mantissa)) * Fraction(2) ** int(exponent)


def _to_odd(x: Fraction) -> float:
    """`x` in float64, the neighbour with an odd last bit if it lies between two: on its own side of every midpoint."""
    try:
        near = float(x)
    except OverflowError:
        return math.copysign(math.inf, x)
    rest = x - Fraction(near)
    if not rest:
        return near
    other = math.nextafter(near, math.inf if rest > 0 else -math.inf)
    return near if int(np.float64(near).view(np.int64)) & 1 else other


KINDS: Mapping[Noise, Kind] = MappingProxyType(
    {
        Noise.SUM_RATIO: Kind(ratio_error, ratio_exact),
        Noise.PRODUCT: Kind(product_error, product_exact),
        Noise.SCORES: Kind(scores_error, scores_exact),
        Noise.WEIGHTED: Kind(weighted_error, weighted_exact),
        Noise.RMS_NORM: Kind(norm_error, norm_exact),
        Noise.SOFTMAX: Kind(softmax_error, softmax_exact),
        Noise.SILU: Kind(silu_error, silu_exact),
        Noise.ROPE: Kind(rope_error, rope_exact),
        Noise.COS_SIN: Kind(cos_sin_error, cos_sin_exact),
        Noise.INV_FREQ: Kind(inv_freq_error, inv_freq_exact),
        Noise.SIGMOID: Kind(sigmoid_error, sigmoid_exact),
        Noise.DISTRIBUTION: Kind(softmax_error, softmax_exact),
        Noise.SHARES: Kind(shares_error, shares_exact),
        Noise.EXPERTS: Kind(experts_error, experts_exact),
        Noise.COMBINED: Kind(combined_error, combined_exact),
    }
)
