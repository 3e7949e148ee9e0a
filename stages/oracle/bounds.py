"""Rounding noise of each kind of stage: how far a right float32 result may lie from the exact one.

`../shared/numerics.md` holds the derivation and measurements; docs/findings/ what was measured again.
All bounds are per element, in the units of the result, against the *unrounded* float64 value.

A kind has two bounds. The calibrated one is a noise scale times lambda, which covers what right kernels were seen
to do. The rigorous one holds for any order of summation in float32, and for tensor cores where they take the operands;
where a kind calls an elementary function, it also assumes that function within 4 ulps (8 u), which the ones of MKL,
Sleef and XLA are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

import ml_dtypes
import numpy as np

from stages.oracle.cores import WIDEST, Core, Cores
from stages.oracle.rounding import round_once
from stages.spec.noise import Noise

# Unit roundoff of float32.
U32 = 2.0**-24
# Unit roundoff of bfloat16 (8 significant bits).
U_BF16 = 2.0**-8
# Smallest normal number of float32 and bfloat16: XLA flushes what is below, torch keeps it.
TINY = 2.0**-126


@dataclass(frozen=True)
class Lambdas(Mapping[Noise, float]):
    """How far right kernels go: by kind of noise a factor of its scale, and the tensor `cores` that may have summed."""

    by_kind: Mapping[Noise, float]
    cores: Cores = field(default_factory=lambda: WIDEST)

    def __getitem__(self, kind: Noise) -> float:
        return self.by_kind[kind]

    def __iter__(self) -> Iterator[Noise]:
        return iter(self.by_kind)

    def __len__(self) -> int:
        return len(self.by_kind)


# Largest |error| / bound seen on correct kernels (numerics.md, docs/findings/forward.md): products 2.9, scaled scores
# and weighted values 2.7, RMSNorm 0.67, softmax 0.6, silu 0.67, RoPE 1.0, cos and sin 0.99, inv_freq 0.25.
LAMBDA = Lambdas(
    {
        Noise.EXACT: 1.0,
        Noise.SUM_RATIO: 4.0,
        Noise.PRODUCT: 4.0,
        Noise.SCORES: 5.0,
        Noise.WEIGHTED: 5.0,
        Noise.RMS_NORM: 1.0,
        Noise.SOFTMAX: 1.2,
        Noise.SILU: 1.5,
        Noise.ROPE: 1.5,
        Noise.COS_SIN: 2.0,
        Noise.INV_FREQ: 1.0,
        Noise.SIGMOID: 1.5,
        Noise.DISTRIBUTION: 1.2,
        Noise.CHOICE: 1.0,
        Noise.SHARES: 2.0,
        Noise.EXPERTS: 4.0,
        Noise.COMBINED: 1.5,
    }
)


# Largest RMS of error / bound at lambda 1 seen on correct kernels, over stages of RMS_COUNT elements or more, float32
# (docs/findings/rms.md). Of few elements the RMS is as wild as the largest; of one it is the largest.
RMS_COUNT = 64
RMS: Mapping[Noise, float] = MappingProxyType(
    {
        Noise.PRODUCT: 0.25,
        Noise.SCORES: 0.25,
        Noise.WEIGHTED: 0.25,
        Noise.RMS_NORM: 0.32,
        Noise.SOFTMAX: 0.20,
        Noise.SILU: 0.16,
        Noise.ROPE: 0.22,
        Noise.COS_SIN: 0.30,
        Noise.INV_FREQ: 0.25,
        Noise.SIGMOID: 0.16,
        Noise.DISTRIBUTION: 0.20,
        Noise.SHARES: 0.28,
        Noise.EXPERTS: 0.25,
        Noise.COMBINED: 0.25,
    }
)
RMS_FACTOR = 3.0
# Largest RMS of error / standard deviation of a tensor that was judged through others: 1.76 was the most seen on right
# programs (docs/findings/spans.md).
RMS_THROUGH = 2.5


def rms_limit(kind: Noise, dtype: np.dtype, lambdas: Lambdas = LAMBDA) -> float:
    """Largest RMS of error / bound of a stage that only rounds: three times what right kernels do.

    Infinite where the statistic says nothing: of exact stages and single numbers, and of a dtype narrower than
    float32, whose own rounding is 0.43 of its bound whatever the kernel did.
    """
    if kind not in RMS or dtype != np.float32:
        return np.inf
    return RMS_FACTOR * RMS[kind] / lambdas[kind]


def residual_bound(rank: int) -> float:
    """Largest relative residual |W - USV^T|_F / |W|_F of a float32 decomposition contracted the right way.

    Each of `rank` terms carries a few float32 roundings that add up like random steps: 16 u sqrt(rank).
    Seen: 3e-7 (float64 SVD) to 2e-6 (float32 gesdd) at ranks 64 to 1,024; a wrong layout gives about 1.
    """
    return 16 * U32 * float(np.sqrt(rank))


def rounding_unit(dtype: np.dtype) -> float:
    """Unit roundoff of a stage's stored dtype."""
    return {"bfloat16": U_BF16, "float16": 2.0**-11, "float64": 2.0**-53}.get(dtype.name, U32)


def exact_bound(result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Half an ulp of the stored dtype: a correctly rounded result is never further away."""
    # The smallest normal number covers results below it, where half an ulp stops shrinking.
    smallest = float(ml_dtypes.finfo(dtype).smallest_normal)
    return rounding_unit(dtype) * np.maximum(np.abs(result), smallest)


def product_bound(a: np.ndarray, b: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Noise scale of `a @ b` over length K: u (sqrt(K) sqrt((a*a) @ (b*b) + result^2) + |result|), at lambda 1.

    Shapes: a `[.., rows, K]`, b `[.., K, cols]`, both the float32 operands. Each of K additions rounds a partial
    sum; the roundings add up like random steps. A partial sum is about the root of the squares summed so far, or
    the result itself where the terms agree in sign (docs/findings/product-bound.md).
    """
    bound = _squares(a, b)  # in place from here on: a new array of a stage's size costs as much as the arithmetic
    bound += result * result
    np.sqrt(bound, out=bound)
    bound *= np.sqrt(a.shape[-1])
    bound += np.abs(result)
    bound *= U32
    bound += _flushed(a, b)
    return bound


def _squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(a*a) @ (b*b) by float32 products, ample for a scale; rows too small to be squared are brought to 1 first."""
    exponent = np.frexp(np.abs(a).max(axis=-1, keepdims=True, initial=0.0))[1]
    small = exponent.min(initial=0) <= -32
    scaled = np.ldexp(a, -exponent) if small else a
    product = by_columns(scaled * scaled, b, np.square)
    return np.ldexp(product, 2 * exponent) if small else product


# Columns of a matrix whose widened or squared copy stays in the cache: 2 MB of a hidden size of 1,024 in float32.
_COLUMNS = 512


def by_columns(a: np.ndarray, b: np.ndarray, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """`a @ of(b)` in float64, `of` elementwise and taken of a few columns of b at a time where b is a matrix."""
    if b.ndim != 2:
        return np.asarray(a @ of(b), np.float64)
    out = np.empty((*a.shape[:-1], b.shape[1]))
    for start in range(0, b.shape[1], _COLUMNS):
        out[..., start : start + _COLUMNS] = a @ of(b[:, start : start + _COLUMNS])
    return out


def _flushed(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What is lost where operands, products and partial sums below 2^-126 count as zero; XLA and MKL do that."""
    top = np.abs(a).max(axis=-1, keepdims=True, initial=0.0).astype(np.float64)
    largest = np.maximum(b.max(initial=0.0), -b.min(initial=0.0))
    return TINY * a.shape[-1] * (2 + top + float(largest))


def product_rigorous(a: np.ndarray, b: np.ndarray, result: np.ndarray, core: Core | None = None) -> np.ndarray:
    """No float32 summation order, nor a tensor `core`, errs by more: gamma_K |a| |b| with gamma_K = K u / (1 - K u).

    N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5. Half an ulp is added
    for the final rounding of a result summed in higher precision.
    """
    k = a.shape[-1] * U32
    most = max(_gamma(a.shape[-1]), 0.0 if core is None else U32 * core.worst(a.shape[-1]))
    # float32 products of absolute values may fall short by their own gamma; hence the factor.
    worst = most * (1 + 2 * k) * (np.abs(a) @ np.abs(b)).astype(np.float64) + U32 * np.abs(result)
    return worst + _flushed(a, b)


def sum_ratio_bound(numerator: np.ndarray, denominator: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Noise scale of `sum(numerator) / sum(denominator)`: both sums' scales and the division, at lambda 1."""
    relative = _sum_noise(numerator) + _sum_noise(denominator) + 1
    return U32 * relative * np.abs(result)


def sum_ratio_rigorous(numerator: np.ndarray, denominator: np.ndarray, result: np.ndarray) -> np.ndarray:
    """gamma_K of both sums and the division's rounding; a sum of mixed signs is amplified by its cancellation."""
    relative = _sum_worst(numerator) + _sum_worst(denominator) + U32
    return relative / (1 - relative) * np.abs(result)


def _sum_noise(x: np.ndarray) -> float:
    x = x.astype(np.float64)
    spread = np.sqrt(x.size) * np.sqrt(np.sum(x * x)) / np.abs(np.sum(x))
    return 1 + float(spread) + _sum_flushed(x) / U32


def _sum_worst(x: np.ndarray) -> float:
    x = x.astype(np.float64)
    return float(_gamma(x.size) * np.sum(np.abs(x)) / np.abs(np.sum(x))) + _sum_flushed(x)


def _sum_flushed(x: np.ndarray) -> float:
    """What a sum loses, relative to it, where its terms below 2^-126 count as zero; XLA does that."""
    size = np.abs(x)
    return float(np.sum(size[size < TINY]) / np.abs(np.sum(x)))


def _gamma(k: int) -> float:
    return k * U32 / (1 - k * U32)


def prescribed(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """`x` with the rounding to `dtype` that a model prescribes inside a stage, still float64.

    To float32 it is left out: there the rounding is part of the kind's noise, not of the model's meaning.
    """
    return x if dtype == np.float32 else round_once(x, dtype).astype(np.float64)


def after_prescribed(x: np.ndarray, error: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """How far `prescribed(y)` may lie from `prescribed(x)` for |y - x| <= error: 0, or one flip to a neighbour."""
    if dtype == np.float32:
        return error
    middle = prescribed(x, dtype)
    return np.maximum(prescribed(x + error, dtype) - middle, middle - prescribed(x - error, dtype))


def scores_bound(
    lam: float, q: np.ndarray, k: np.ndarray, scale: float, dtype: np.dtype, result: np.ndarray
) -> np.ndarray:
    """`(q @ k) * scale`, the product rounded to `dtype` in between; q `[.., rows, K]`, k `[.., K, cols]`, float32."""
    product = q.astype(np.float64) @ k.astype(np.float64)
    error = after_prescribed(product, lam * product_bound(q, k, product), dtype)
    return error * scale + lam * U32 * np.abs(result)


def scores_rigorous(
    q: np.ndarray, k: np.ndarray, scale: float, dtype: np.dtype, result: np.ndarray, core: Core | None = None
) -> np.ndarray:
    """As `scores_bound`, from the product's rigorous bound; u for the scale's own rounding, u for the last one."""
    product = q.astype(np.float64) @ k.astype(np.float64)
    error = after_prescribed(product, product_rigorous(q, k, product, core), dtype)
    return (error * scale + 2 * U32 * np.abs(result)) * (1 + 4 * U32)


def weighted_bound(lam: float, p: np.ndarray, v: np.ndarray, result: np.ndarray) -> np.ndarray:
    """`p @ v` per head, p `[heads, rows, K]`, v `[heads, K, dim]`; result `[rows, heads * dim]`."""
    return _joined(lam * product_bound(p, v, _by_head(result, len(p))))


def weighted_rigorous(p: np.ndarray, v: np.ndarray, result: np.ndarray, core: Core | None = None) -> np.ndarray:
    """As `weighted_bound`, each head's product by its rigorous bound."""
    return _joined(product_rigorous(p, v, _by_head(result, len(p)), core))


def _by_head(x: np.ndarray, heads: int) -> np.ndarray:
    return x.reshape(len(x), heads, -1).swapaxes(0, 1)


def _joined(x: np.ndarray) -> np.ndarray:
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def norm_bound(lam: float, normed: np.ndarray, weight: np.ndarray, dtype: np.dtype, result: np.ndarray) -> np.ndarray:
    """RMSNorm over K: u |normed| (sqrt(K)/8 + 6) before the cast to `dtype`, then times the weight.

    The sum of squares has no cancellation and its relative error is halved by the root; the six roundings beside
    it dominate: 4.1 to 4.5 u was the most seen, whatever K (docs/findings/forward.md).
    """
    error = lam * U32 * (np.sqrt(normed.shape[-1]) / 8 + 6) * np.abs(normed)
    return after_prescribed(normed, error, dtype) * np.abs(weight)


def norm_rigorous(normed: np.ndarray, weight: np.ndarray, dtype: np.dtype, result: np.ndarray) -> np.ndarray:
    """The mean of K squares errs by gamma_{K+3} at most, with eps; the root halves it, and adds 8 u for itself.

    (1 - g)^-1/2 - 1 is below g (1 + g) / 2 * (1 + g) for g < 1/2. Two products: 2 u.
    """
    g = _gamma(normed.shape[-1] + 3)
    error = (g * (1 + g) ** 2 / 2 + 10 * U32) * np.abs(normed)
    return after_prescribed(normed, error, dtype) * np.abs(weight) + U32 * np.abs(result)


def softmax_bound(lam: float, scores: np.ndarray, result: np.ndarray) -> np.ndarray:
    """u p (|s - max| + sqrt(n) + 4); `scores` masked with -inf."""
    below = _below_max(scores)
    return lam * U32 * result * (below + np.sqrt(scores.shape[-1]) + 4)


def softmax_rigorous(scores: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Numerator and denominator err by 4 u |s - max| + 8 u at most, whatever base the exponential is taken in
    (s * log2(e) rounds twice); the sum adds gamma_n, the division u; the sum's share is an average over p."""
    below = _below_max(scores)
    each = U32 * (4 * below + 8)
    relative = each + np.sum(result * each, axis=-1, keepdims=True) + _gamma(scores.shape[-1]) + 2 * U32
    return result * relative / (1 - np.minimum(relative, 0.5))


def _below_max(scores: np.ndarray) -> np.ndarray:
    below = np.max(scores, axis=-1, keepdims=True) - scores
    return np.where(np.isfinite(below), below, 0.0)  # a masked key has probability 0, without error


def silu_bound(lam: float, x: np.ndarray, result: np.ndarray) -> np.ndarray:
    """6 u |r|; below x = -88.7 exp(-x) overflows float32 and the result may be 0, at most |x| 2^-128 away."""
    return lam * 6 * U32 * np.abs(result) + np.abs(x) * TINY


def silu_rigorous(x: np.ndarray, result: np.ndarray) -> np.ndarray:
    """exp within 8 u, a sum, a quotient, a product: 12 u |r|. By tanh, (1 + tanh(x/2)) / 2, it cancels: 8 u |x|."""
    return 12 * U32 * np.abs(result) + (8 * U32 + TINY) * np.abs(x)


def rope_bound(lam: float, direct: np.ndarray, turned: np.ndarray, result: np.ndarray) -> np.ndarray:
    """2u (|x cos| + |x' sin|) + u |r|, from the two float64 products."""
    return lam * U32 * (2 * (np.abs(direct) + np.abs(turned)) + np.abs(result))


def rope_rigorous(direct: np.ndarray, turned: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Each product is rounded once, the sum once: half of `rope_bound` at lambda 1 and more."""
    return rope_bound(1.0, direct, turned, result)


def cos_sin_bound(lam: float, scale: float, result: np.ndarray) -> np.ndarray:
    """2u |r|."""
    return lam * 2 * U32 * np.abs(result)


def cos_sin_rigorous(scale: float, result: np.ndarray) -> np.ndarray:
    """8 u of the largest value: a library may bound its absolute error only, near the zeros; and the scale's u."""
    return (8 * U32 * scale + 2 * U32 * np.abs(result)) * (1 + 4 * U32)


def inv_freq_bound(
    lam: float, logarithm: np.ndarray, number: np.ndarray, extra: np.ndarray, result: np.ndarray
) -> np.ndarray:
    """u (6 + 4 |log f| + 2 i) |r|, f the i-th unscaled frequency, whichever way it is made; and what a scaling adds.

    A power and a reciprocal: 6 u with a scale's operations. exp(-e log theta), or in base 2: a rounded logarithm,
    exponent and product, u |log f| each, and one to spare. Powers of theta^(-2/d) multiplied up: each step adds
    its own rounding and the first power's.
    """
    return lam * U32 * ((6 + 4 * logarithm + 2 * number) * np.abs(result) + extra)


def inv_freq_rigorous(logarithm: np.ndarray, number: np.ndarray, extra: np.ndarray, result: np.ndarray) -> np.ndarray:
    """As `inv_freq_bound`, a logarithm, an exponential and a power within 8 u, and 8 operations."""
    return U32 * ((16 + 10 * logarithm + 10 * number) * np.abs(result) + 2 * extra)


def sigmoid_bound(result: np.ndarray) -> np.ndarray:
    """6 u |r|, as silu's; where exp(-x) overflows float32 the result may be 0."""
    return 6 * U32 * np.abs(result) + TINY


def sigmoid_rigorous(result: np.ndarray) -> np.ndarray:
    """exp within 8 u, a sum, a quotient; by tanh, (1 + tanh(x/2)) / 2, it cancels: 8 u."""
    return 12 * U32 * np.abs(result) + 8 * U32


def shares_bound(below: np.ndarray, renormalised: bool, result: np.ndarray) -> np.ndarray:
    """u r (b + mean b + sqrt(k) + 5), b how far below the largest each logit is; without a sum, u r (b + 5).

    They may be made of the recorded probabilities, or again from the logits, whose difference an exponential takes.
    """
    mean = np.sum(result * below, axis=-1, keepdims=True) + np.sqrt(below.shape[-1]) if renormalised else 0.0
    return U32 * result * (below + mean + 5)


def shares_rigorous(below: np.ndarray, renormalised: bool, result: np.ndarray) -> np.ndarray:
    """As `softmax_rigorous`: 4 u b + 8 u each, their mean for the sum, gamma_k and the division."""
    each = U32 * (4 * below + 8)
    mean = np.sum(result * each, axis=-1, keepdims=True) + _gamma(below.shape[-1]) if renormalised else 0.0
    relative = 2 * (each + mean) + 2 * U32
    return result * relative / (1 - np.minimum(relative, 0.5))


# An expert's product: where its rows stand, and its factors.
ExpertFactors = list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]


def experts_bound(lam: float, factors: ExpertFactors, result: np.ndarray) -> np.ndarray:
    """`product_bound` of each expert's rows; result `[tokens, topk, out]`."""
    return _of_experts(factors, result, lambda x, w, y: lam * product_bound(x, w, y))


def experts_rigorous(factors: ExpertFactors, result: np.ndarray, core: Core | None = None) -> np.ndarray:
    """`product_rigorous` of each expert's rows."""
    return _of_experts(factors, result, lambda x, w, y: product_rigorous(x, w, y, core))


def _of_experts(factors: ExpertFactors, result: np.ndarray, bound: Callable[..., np.ndarray]) -> np.ndarray:
    out = np.zeros(result.shape)
    for token, place, x, w in factors:
        out[token, place] = bound(x, w, result[token, place])
    return out


def combined_bound(terms: np.ndarray, dtype: np.dtype, result: np.ndarray) -> np.ndarray:
    """v (sqrt(k) sqrt(q + r^2) + |r| + sqrt(q)), q the sum of the squares of the k terms, v the unit of `dtype`.

    Each term is rounded and each sum of them, to `dtype` where experts are added one after the other; `terms` is
    `[tokens, k, hidden]`.
    """
    squares = np.sum(terms * terms, axis=1)
    spread = np.sqrt(terms.shape[1]) * np.sqrt(squares + result * result)
    return rounding_unit(dtype) * (spread + np.abs(result) + np.sqrt(squares))


def combined_rigorous(terms: np.ndarray, dtype: np.dtype, result: np.ndarray) -> np.ndarray:
    """k + 1 roundings of each term at most."""
    unit = rounding_unit(dtype) * (terms.shape[1] + 1)
    return unit / (1 - unit) * np.sum(np.abs(terms), axis=1)


def _scaled(scale: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda lam, *operands: lam * scale(*operands)


# Kind -> calibrated and rigorous bound, each a function of the stage's noise operands (reference.OPERANDS) and of
# the float64 result; the calibrated one of its lambda before them. EXACT has none: its bound is the rounding to the
# stored dtype alone.
BOUNDS: Mapping[Noise, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray]]] = MappingProxyType(
    {
        Noise.SUM_RATIO: (_scaled(sum_ratio_bound), sum_ratio_rigorous),
        Noise.PRODUCT: (_scaled(product_bound), product_rigorous),
        Noise.WEIGHTED: (weighted_bound, weighted_rigorous),
        Noise.SCORES: (scores_bound, scores_rigorous),
        Noise.RMS_NORM: (norm_bound, norm_rigorous),
        Noise.SOFTMAX: (softmax_bound, softmax_rigorous),
        Noise.SILU: (silu_bound, silu_rigorous),
        Noise.ROPE: (rope_bound, rope_rigorous),
        Noise.COS_SIN: (cos_sin_bound, cos_sin_rigorous),
        Noise.INV_FREQ: (inv_freq_bound, inv_freq_rigorous),
        Noise.SIGMOID: (_scaled(sigmoid_bound), sigmoid_rigorous),
        Noise.DISTRIBUTION: (softmax_bound, softmax_rigorous),
        Noise.SHARES: (_scaled(shares_bound), shares_rigorous),
        Noise.EXPERTS: (experts_bound, experts_rigorous),
        Noise.COMBINED: (_scaled(combined_bound), combined_rigorous),
    }
)


# Kinds that a tensor core may sum.
PRODUCTS = (Noise.PRODUCT, Noise.SCORES, Noise.WEIGHTED, Noise.EXPERTS)


def calibrated(
    kind: Noise,
    operands: tuple,
    result: np.ndarray,
    dtype: np.dtype,
    lambdas: Lambdas = LAMBDA,
    more: np.ndarray | float = 0.0,
) -> np.ndarray:
    """The bound of `kind` at its lambda, and of the rounding to a stored `dtype` narrower than float32.

    `more` is what the value may be off beside it, before that rounding.
    """
    if kind is Noise.CHOICE:
        return np.zeros(result.shape)  # judged by what is admissible
    noise = 0.0 if kind is Noise.EXACT else BOUNDS[kind][0](lambdas[kind], *operands, result)
    return _stored(kind, noise, more, result, dtype)


def rigorous(
    kind: Noise,
    operands: tuple,
    result: np.ndarray,
    dtype: np.dtype,
    more: np.ndarray | float = 0.0,
    core: Core | None = None,
) -> np.ndarray:
    """The bound of `kind` that no order of summation exceeds, nor a tensor `core`, stored in `dtype`."""
    if kind is Noise.CHOICE:
        return np.zeros(result.shape)
    summed = {"core": core} if kind in PRODUCTS else {}
    noise = 0.0 if kind is Noise.EXACT else BOUNDS[kind][1](*operands, result, **summed)
    return _stored(kind, noise, more, result, dtype)


def _stored(
    kind: Noise, noise: np.ndarray | float, more: np.ndarray | float, result: np.ndarray, dtype: np.dtype
) -> np.ndarray:
    if kind is not Noise.EXACT:
        return stored_bound(noise + more, result, dtype)
    if np.ndim(more) == 0:
        return exact_bound(result, dtype)
    # In float32 a kind's noise has the last rounding in it; of one operation that rounding is all.
    return stored_bound(more + U32 * (np.abs(result) + more) if dtype == np.float32 else more, result, dtype)


def stored_bound(noise: np.ndarray | float, result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """How far from `result` a number may be stored whose value lay within `noise` of it.

    In 16 bits that is one of the roundings of what lies between, so less than half a unit beside the noise: a value
    that is not near a midpoint has one rounding alone. It holds for the value itself too, where nothing rounded it.
    """
    if dtype == np.float32:
        return np.maximum(noise, TINY)  # its own rounding is in the noise; a subnormal may have been flushed
    with np.errstate(over="ignore", invalid="ignore"):
        above, below = (round_once(end, dtype).astype(np.float64) for end in (result + noise, result - noise))
        reach = np.maximum(np.maximum(above - result, result - below), noise)
    return np.maximum(reach, np.maximum(half_unit(result, dtype), TINY))


def half_unit(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Half the distance between numbers of `dtype` about `x`; at a power of two, to the one below."""
    mantissa, exponent = np.frexp(x)
    exponent = exponent - (np.abs(mantissa) == 0.5)
    least = rounding_unit(dtype) * float(ml_dtypes.finfo(dtype).smallest_normal)
    return np.where(x == 0, least, np.maximum(np.ldexp(rounding_unit(dtype), exponent - 1), least))
