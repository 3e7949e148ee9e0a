"""Kinds of rounding error that a stage may have; their bounds are in oracle/bounds.py."""

from __future__ import annotations

from enum import StrEnum


class Noise(StrEnum):
    """Where a stage's rounding error comes from; decides which bound it is judged by."""

    EXACT = "exact"  # one correctly rounded operation, a copy or a cast: no error beyond that rounding
    SUM_RATIO = "sum ratio"  # a quotient of two float32 sums
    PRODUCT = "product"  # sums of K products
    SCORES = "scores"  # sums of K products, rounded, times a scale
    WEIGHTED = "weighted"  # sums of values with probabilities
    RMS_NORM = "rms norm"  # x / sqrt(mean(x^2) + eps), rounded, times a weight
    SOFTMAX = "softmax"
    SILU = "silu"
    ROPE = "rope"  # a sum of two products
    COS_SIN = "cos sin"
    INV_FREQ = "inv freq"  # a power and a reciprocal
    SIGMOID = "sigmoid"
    DISTRIBUTION = "distribution"  # softmax over all of the last axis
    CHOICE = "choice"  # indices of the largest: any that rounding of what they were chosen by can make so
    SHARES = "shares"  # probabilities over the sum of some of them
    EXPERTS = "experts"  # sums of K products, with the weights of each chosen expert
    COMBINED = "combined"  # the sum of a few vectors times their shares
