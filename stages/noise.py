"""Rounding noise of each kind of stage: how far a right float32 result may lie from the exact one.

`../shared/numerics.md` holds the derivation and measurements; docs/findings/ what was measured again.
All bounds are per element, in the units of the result, against the *unrounded* float64 value.
"""

from __future__ import annotations

from enum import StrEnum

import numpy as np

# Unit roundoff of float32.
U32 = 2.0**-24
# Unit roundoff of bfloat16 (8 significant bits).
U_BF16 = 2.0**-8
# Smallest normal float32 and bfloat16.
FLUSH = 2.0**-126


class Noise(StrEnum):
    """Where a stage's rounding error comes from; decides which bound it is judged by."""

    EXACT = "exact"  # one correctly rounded operation, a copy or a cast: no error beyond that rounding
    SUM_RATIO = "sum ratio"  # a quotient of two float32 sums
    PRODUCT = "product"  # sums of K products


# Largest |error| / bound seen for products: 1.9 for JAX, 1.1 for torch, in 327M elements (product-bound.md).
LAMBDA = {Noise.EXACT: 1.0, Noise.SUM_RATIO: 4.0, Noise.PRODUCT: 4.0}


def rounding_unit(dtype: np.dtype) -> float:
    """Unit roundoff of a stage's stored dtype."""
    return U_BF16 if dtype.name == "bfloat16" else U32


def exact_bound(result: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Half an ulp of the stored dtype: a correctly rounded result is never further away."""
    # The smallest normal number covers results below it, where half an ulp stops shrinking.
    return rounding_unit(dtype) * np.maximum(np.abs(result), FLUSH)


def product_bound(a: np.ndarray, b: np.ndarray, result: np.ndarray) -> np.ndarray:
    """Noise scale of `a @ b` over length K: u (sqrt(K) sqrt((a*a) @ (b*b) + result^2) + |result|), at lambda 1.

    Shapes: a `[rows, K]`, b `[K, cols]`, both the float32 operands. Each of K additions rounds a partial sum;
    the roundings add up like random steps. A partial sum is about the root of the squares summed so far, or the
    result itself where the terms agree in sign (docs/findings/product-bound.md).
    """
    # float32 is ample for a scale, but not for squares of 1e-20: rows of near-zero weights are brought to 1 first.
    top = np.abs(a).max(axis=1, keepdims=True, initial=0.0)
    exponent = np.frexp(top)[1]
    scaled = np.ldexp(a, -exponent)
    squares = np.ldexp(((scaled * scaled) @ (b * b)).astype(np.float64), 2 * exponent)
    noise = U32 * (np.sqrt(a.shape[-1]) * np.sqrt(squares + result * result) + np.abs(result))
    return noise + _flushed(top, b, a.shape[-1])


def _flushed(top: np.ndarray, b: np.ndarray, k: int) -> np.ndarray:
    """What is lost where operands, products and partial sums below 2^-126 count as zero; XLA and MKL do that."""
    return FLUSH * k * (2 + top.astype(np.float64) + float(np.abs(b).max(initial=0.0)))


def product_rigorous(a: np.ndarray, b: np.ndarray, result: np.ndarray) -> np.ndarray:
    """No float32 summation order errs by more: gamma_K |a| |b| with gamma_K = K u / (1 - K u).

    N. Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., eq. 3.5. Half an ulp is added
    for the final rounding of a result summed in higher precision.
    """
    k = a.shape[-1] * U32
    # float32 products of absolute values may fall short by their own gamma; hence the factor.
    worst = k / (1 - k) * (1 + 2 * k) * (np.abs(a) @ np.abs(b)).astype(np.float64) + U32 * np.abs(result)
    return worst + _flushed(np.abs(a).max(axis=1, keepdims=True, initial=0.0), b, a.shape[-1])


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
    return 1 + float(np.sqrt(x.size) * np.sqrt(np.sum(x * x)) / np.abs(np.sum(x)))


def _sum_worst(x: np.ndarray) -> float:
    x, k = x.astype(np.float64), x.size * U32
    return float(k / (1 - k) * np.sum(np.abs(x)) / np.abs(np.sum(x)))
