"""Verdicts: right kernels pass on hostile data, and every planted fault is called what it is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import factors, make_offsets

from stages.oracle import bounds as noise
from stages.oracle.verdict import Oracle, Verdict, canonical, consult, judge, worst
from stages.recipes.side import SideVerdict
from stages.spec.backend import Backend
from stages.spec.forward import DECLARED
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY

BF16 = ml_dtypes.bfloat16
PRODUCT, SUM = REPLAY["matmul_pre_norm"], REPLAY["normalization"]
TORCH_V = {"layout": "torch_v"}


def bf16(a: np.ndarray) -> np.ndarray:
    return a.astype(BF16).astype(np.float32)


def product(a: np.ndarray, v: np.ndarray) -> Oracle:
    return consult(PRODUCT, (a, v), TORCH_V)


# Operands that are hard on a summation: K, and how to fill [rows, K] and [cols, K].
HOSTILE: dict[str, Callable[[np.random.Generator, int, int], np.ndarray]] = {
    "normal": lambda rng, n, k: rng.standard_normal((n, k)),
    "one sign": lambda rng, n, k: rng.uniform(1, 2, (n, k)),
    "seven orders of magnitude": lambda rng, n, k: rng.standard_normal((n, k)) * 10.0 ** rng.uniform(-7, 0, (n, k)),
    "cancelling pairs": lambda rng, n, k: np.repeat(rng.standard_normal((n, k // 2)), 2, 1) * np.tile([1, -1], k // 2),
    "one outlier channel": lambda rng, n, k: rng.standard_normal((n, k)) * np.r_[1e4, np.ones(k - 1)],
    "sparse": lambda rng, n, k: rng.standard_normal((n, k)) * (rng.random((n, k)) < 0.05),
    "zeros": lambda rng, n, k: np.zeros((n, k)),
    "integers": lambda rng, n, k: rng.integers(-3, 4, (n, k)).astype(float),
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("k", [2, 64, 512, 2048])
def test_a_right_product_passes_on_hostile_data(backend: Backend, kind: str, k: int) -> None:
    rng = np.random.default_rng(k)
    a, v = (HOSTILE[kind](rng, n, k).astype(np.float32) for n in (48, 40))
    out = backend.get(backend.replay[PRODUCT.name](backend.put(a), backend.put(v), **TORCH_V))
    verdict, ratio = judge(product(a, v), out)
    assert verdict.passes, ratio


@pytest.mark.parametrize("kind", HOSTILE)
def test_any_order_of_summation_is_within_the_rigorous_bound(kind: str) -> None:
    rng = np.random.default_rng(0)
    a, v = (HOSTILE[kind](rng, n, 64).astype(np.float32) for n in (16, 12))
    oracle = product(a, v)
    for order in (np.arange(64), np.arange(64)[::-1], rng.permutation(64)):
        total = np.zeros((16, 12), np.float32)
        for j in order:
            total += np.outer(a[:, j], v[:, j])
        assert (np.abs(total.astype(np.float64) - oracle.value) <= oracle.rigorous()).all()
        assert judge(oracle, total)[0] is not Verdict.BUG


@settings(max_examples=30, deadline=None)
@given(size=st.integers(1, 2000), seed=st.integers(0, 99), spread=st.sampled_from([0, 2, 6]))
def test_a_right_normalization_passes(backend: Backend, size: int, seed: int, spread: int) -> None:
    rng = np.random.default_rng(seed)
    s = (10.0 ** rng.uniform(-spread, 0, size)).astype(np.float32)
    scaled = s * (1 + rng.uniform(-0.3, 0.3, size).astype(np.float32))
    oracle = consult(SUM, (scaled, s), {})
    out = backend.get(backend.replay[SUM.name](backend.put(scaled), backend.put(s)))
    assert judge(oracle, out)[0].passes


# Faults in a product. V is square, so that its transpose has the right shape.
U, S, V = factors(96, 64, 0, power=0.5)
A = U * S
RIGHT = (A @ V.T).astype(np.float32)


def changed(index: tuple[int, ...], factor: float) -> np.ndarray:
    out = RIGHT.copy()
    out[index] *= np.float32(factor)
    return out


FAULTS: dict[str, tuple[Callable[[], np.ndarray], Verdict]] = {
    "operands cast to bfloat16": (lambda: bf16(A) @ bf16(V).T, Verdict.BUG),
    "one operand cast to bfloat16": (lambda: bf16(A) @ V.T, Verdict.BUG),
    "result cast to bfloat16": (lambda: bf16(RIGHT), Verdict.BUG),
    "the first term dropped": (lambda: A[:, 1:] @ V[:, 1:].T, Verdict.BUG),
    "the last term dropped": (lambda: A[:, :-1] @ V[:, :-1].T, Verdict.BUG),
    "V transposed": (lambda: A @ V, Verdict.BUG),
    "scaled by 1 + 1e-3": (lambda: RIGHT * np.float32(1.001), Verdict.BUG),
    "scaled by 1 + 1e-4": (lambda: RIGHT * np.float32(1.0001), Verdict.BUG),
    "the other sign": (lambda: -RIGHT, Verdict.BUG),
    "two rows swapped": (lambda: RIGHT[np.r_[1, 0, 2:96]], Verdict.BUG),
    "one element off by 1%": (lambda: changed((50, 3), 1.01), Verdict.BUG),
    "one element zero": (lambda: changed((95, 63), 0.0), Verdict.BUG),
    "all zero": (lambda: np.zeros_like(RIGHT), Verdict.BUG),
    "one NaN": (lambda: changed((95, 63), np.nan), Verdict.NONFINITE),
    "one infinity": (lambda: changed((0, 0), np.inf), Verdict.NONFINITE),
    "transposed": (lambda: RIGHT.T, Verdict.SHAPE),
    "one row short": (lambda: RIGHT[:-1], Verdict.SHAPE),
    "flat": (lambda: RIGHT.reshape(-1), Verdict.SHAPE),
    "float64": (lambda: RIGHT.astype(np.float64), Verdict.SHAPE),
    "bfloat16": (lambda: RIGHT.astype(BF16), Verdict.SHAPE),
    "nothing wrong": (lambda: RIGHT, Verdict.ROUNDING),
    "correctly rounded": (lambda: product(A, V).rounded, Verdict.EXACT),
}


def test_a_normalization_whose_small_terms_count_as_zero_passes() -> None:
    """Singular values of weights near 1e-36, the least of them subnormal: XLA leaves those out."""
    s = np.geomspace(1e-36, 1e-39, 64).astype(np.float32)
    scaled = s * np.linspace(0.5, 1.5, 64, dtype=np.float32)
    flushed = [np.float32(canonical(x).astype(np.float64).sum()) for x in (s, scaled)]
    oracle = consult(SUM, (scaled, s), {})
    for observed in (oracle.rounded, np.array([flushed[0] / flushed[1]], np.float32)):
        assert judge(oracle, observed)[0].passes
    assert not judge(oracle, oracle.rounded * np.float32(1.5))[0].passes
    large = consult(SUM, (scaled * np.float32(1e9), s * np.float32(1e9)), {})
    assert not judge(large, large.rounded * np.float32(1 + 1e-5))[0].passes


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_product_is_called_what_it_is(fault: str) -> None:
    make, expected = FAULTS[fault]
    verdict, ratio = judge(product(A, V), make())
    assert verdict is expected, ratio
    assert (ratio > 1) == (not verdict.passes)


def test_between_both_bounds_is_suspect() -> None:
    oracle = product(A, V)
    out = RIGHT.copy()
    calibrated, rigorous = oracle.bound[0, 0], oracle.rigorous()[0, 0]
    assert calibrated < rigorous
    out[0, 0] = oracle.value[0, 0] + (calibrated + rigorous) / 2
    assert judge(oracle, out)[0] is Verdict.SUSPECT


SUM_FAULTS: dict[str, tuple[Callable[[np.ndarray, np.ndarray], Any], bool]] = {
    "upside down": (lambda scaled, s: scaled.sum() / s.sum(), False),
    "one value left out": (lambda scaled, s: s[1:].sum() / scaled.sum(), False),
    "mean of quotients": (lambda scaled, s: (s / scaled).mean(), False),
    "bfloat16 sums": (lambda scaled, s: bf16(s).sum() / bf16(scaled).sum(), False),
    "one": (lambda scaled, s: np.float32(1), False),
    "right": (lambda scaled, s: s.sum() / scaled.sum(), True),
}


@pytest.mark.parametrize("fault", SUM_FAULTS)
def test_a_fault_in_the_normalization(fault: str) -> None:
    make, passes = SUM_FAULTS[fault]
    scaled = S * (1 + make_offsets("mixed", 64, 0))
    verdict, ratio = judge(consult(SUM, (scaled, S), {}), np.float32([make(scaled, S)]))
    assert verdict.passes is passes, ratio


def exact_cases() -> dict[str, tuple[tuple[np.ndarray, ...], dict[str, Any]]]:
    """Arguments and options of every stage that must be exact."""
    offsets, one = make_offsets("mixed", 64, 1), np.float32([0.93])
    return {
        "source_f32": ((RIGHT,), {}),
        "offsets_f32": ((offsets,), {}),
        "scaled_s": ((offsets, S), {}),
        "u_scaled": ((S, U), {}),
        "adapted_source_f32": ((RIGHT, one), {}),
        "final_f32": ((RIGHT,), {"transpose": True}),
        "final_bf16": ((RIGHT,), {}),
    }


EXACT = exact_cases()


def test_those_are_all_exact_stages() -> None:
    assert set(EXACT) == {name for name, stage in REPLAY.items() if stage.noise == "exact"}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("step", [1, -1])
def test_an_exact_stage_off_by_one_ulp_is_a_bug(name: str, step: int) -> None:
    oracle = consult(REPLAY[name], *EXACT[name])
    out = oracle.rounded.copy()
    assert judge(oracle, out)[0] is Verdict.EXACT
    bits = out.reshape(-1).view(f"i{out.dtype.itemsize}")
    bits[bits.size // 2] += step
    assert judge(oracle, out)[0] is Verdict.BUG


def test_truncation_to_bfloat16_is_a_bug() -> None:
    oracle = consult(REPLAY["final_bf16"], (RIGHT,), {})
    truncated = (RIGHT.view(np.uint32) >> 16).astype(np.uint16).view(BF16)
    assert judge(oracle, truncated)[0] is Verdict.BUG


def test_zero_has_no_sign_for_a_verdict() -> None:
    oracle = consult(REPLAY["source_f32"], (np.float32([[0.0, -0.0]]),), {})
    assert judge(oracle, np.float32([[-0.0, 0.0]]))[0] is Verdict.EXACT


@pytest.mark.parametrize("dtype", [np.float32, BF16])
def test_canonical_flushes_subnormals_and_nothing_else(dtype: Any) -> None:
    tiny = np.array([2.0**-126, -(2.0**-126), 2.0**-127, -(2.0**-130), 0, 1, np.inf, np.nan], np.float64).astype(dtype)
    out = canonical(tiny).astype(np.float64)
    assert out.dtype == np.float64
    assert canonical(tiny).dtype == tiny.dtype
    assert np.array_equal(out, [2.0**-126, -(2.0**-126), 0, 0, 0, 1, np.inf, np.nan], equal_nan=True)


def test_a_flushed_and_a_kept_subnormal_are_both_exact() -> None:
    oracle = consult(REPLAY["u_scaled"], (np.float32([2.0**-100]), np.float32([[2.0**-30]])), {})
    for value in (2.0**-130, 0.0):
        assert judge(oracle, np.float32([[value]]))[0] is Verdict.EXACT
    assert judge(oracle, np.float32([[2.0**-120]]))[0] is Verdict.BUG


def test_the_worst_of_a_sides_chunks_counts_and_stays() -> None:
    side = SideVerdict()
    oracle = product(A, V)
    seen = []
    for out in (oracle.rounded, RIGHT, RIGHT * np.float32(1.001), RIGHT):
        side.add(oracle, out)
        seen.append(side.verdict)
    assert seen == [Verdict.EXACT, Verdict.ROUNDING, Verdict.BUG, Verdict.BUG]
    assert side.ratio > 100


def test_the_order_of_verdicts_and_which_of_them_pass() -> None:
    assert worst(Verdict.EXACT, Verdict.SHAPE, Verdict.ROUNDING) is Verdict.SHAPE
    assert [v for v in Verdict if v.passes] == [Verdict.EXACT, Verdict.ROUNDING, Verdict.ACCEPTED, Verdict.TIE]
    assert {v for v in Verdict if not v.passes and not v.fails} == {Verdict.GIVEN, Verdict.UNJUDGED}


# -- all elements together ----------------------------------------------------------------------------------------


def sided(oracle: Oracle, *outs: np.ndarray) -> SideVerdict:
    side = SideVerdict()
    for out in outs:
        side.add(oracle, out)
    return side


def test_errors_within_their_bounds_but_all_too_large_are_suspect() -> None:
    oracle = product(A, V)
    limit = noise.rms_limit(Noise.PRODUCT, np.dtype("f4"))
    for share, verdict in ((0.7 * limit, Verdict.ROUNDING), (1.3 * limit, Verdict.SUSPECT)):
        out = (oracle.value + share * oracle.bound * np.where(np.arange(64) % 2, 1, -1)).astype(np.float32)
        side = sided(oracle, out)
        assert (side.elementwise, side.verdict) == (Verdict.ROUNDING, verdict)
        assert side.rms_ratio == pytest.approx(share, rel=0.05)
        assert ("all together err" in (side.hint or "")) == (verdict is Verdict.SUSPECT)


def test_the_rms_is_of_all_chunks_and_of_elements_that_are_not_zero() -> None:
    oracle = product(A, V)
    whole = sided(oracle, RIGHT)
    assert sided(oracle, RIGHT, RIGHT).rms_ratio == pytest.approx(whole.rms_ratio)
    half = sided(oracle, RIGHT, oracle.rounded)
    assert half.rms_ratio == pytest.approx(whole.rms_ratio * 2**-0.5)
    padded = product(np.concatenate([A, np.zeros_like(A)]), V)
    assert sided(padded, np.concatenate([RIGHT, np.zeros_like(RIGHT)])).rms_ratio == pytest.approx(whole.rms_ratio)


def test_of_few_elements_the_rms_says_nothing() -> None:
    a, limit = A[:1], noise.rms_limit(Noise.PRODUCT, np.dtype("f4"))
    for columns, verdict in ((noise.RMS_COUNT - 1, Verdict.ROUNDING), (noise.RMS_COUNT, Verdict.SUSPECT)):
        oracle = product(a, V[:columns])
        out = (oracle.value + 1.5 * limit * oracle.bound).astype(np.float32)
        assert sided(oracle, out).verdict is verdict


def test_a_worse_verdict_on_an_element_is_not_softened_by_the_rms() -> None:
    side = sided(product(A, V), RIGHT * np.float32(1.001))
    assert (side.verdict, side.systematic) == (Verdict.BUG, True)


def test_every_kind_of_sums_and_functions_has_an_rms() -> None:
    assert set(noise.RMS) == set(Noise) - {Noise.EXACT, Noise.SUM_RATIO, Noise.CHOICE}
    for kind, rms in noise.RMS.items():
        assert 0 < rms < noise.rms_limit(kind, np.dtype("f4")) * noise.LAMBDA[kind]
        assert noise.rms_limit(kind, np.dtype("f4")) < 1  # else it would never say anything
        assert noise.rms_limit(kind, np.dtype(np.float16)) == np.inf


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.parametrize("k", [64, 2048])
def test_no_right_product_is_suspect_by_its_rms(backend: Backend, kind: str, k: int) -> None:
    rng = np.random.default_rng(k)
    a, v = (HOSTILE[kind](rng, n, k).astype(np.float32) for n in (16, 64))
    out = backend.get(backend.replay[PRODUCT.name](backend.put(a), backend.put(v), **TORCH_V))
    assert sided(product(a, v), out).verdict.passes


# -- float16 ------------------------------------------------------------------------------------------------------

F16 = {name: dataclasses.replace(stage, dtype="float16") for name, stage in DECLARED.items()}
HALF = np.float16
HEADS = {"heads": 2, "kv_heads": 2, "head_dim": 8}


def half(rng: np.random.Generator, *shape: int, scale: float = 1.0) -> np.ndarray:
    return (rng.standard_normal(shape) * scale).astype(HALF)


def norm16(x: np.ndarray, w: np.ndarray, *, eps: float) -> np.ndarray:
    wide = x.astype(np.float32)
    normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + np.float32(eps))
    return w * normed.astype(HALF)


def softmax16(scores: np.ndarray) -> np.ndarray:
    masked = np.where(np.tri(scores.shape[-1], dtype=bool), scores.astype(np.float32), -np.inf)
    e = np.exp(masked - masked.max(-1, keepdims=True))
    return (e / e.sum(-1, keepdims=True)).astype(HALF)


def silu16(x: np.ndarray) -> np.ndarray:
    wide = x.astype(np.float32)
    return (wide / (1 + np.exp(-wide))).astype(HALF)


def rope16(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, **_: int) -> np.ndarray:
    turned = np.concatenate((-x[..., 4:], x[..., :4]), -1)
    return x * cos[:, None] + turned * sin[:, None]  # numpy rounds each float16 operation


def product16(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    return (x.astype(np.float32) @ w.T.astype(np.float32)).astype(HALF)


# Stage -> arguments of a random generator and a scale, options, and a right kernel: float32, then float16.
HALVES: dict[str, tuple[Callable[..., tuple[np.ndarray, ...]], dict[str, Any], Callable[..., np.ndarray]]] = {
    "ffn_gate": (lambda r, s: (half(r, 5, 64, scale=s), half(r, 32, 64)), {}, product16),
    "ffn_norm": (lambda r, s: (half(r, 5, 64, scale=s), half(r, 64)), {"eps": 1e-6}, norm16),
    "ffn_silu": (lambda r, s: (half(r, 5, 64, scale=s),), {}, silu16),
    "ffn_swigl": (lambda r, s: (half(r, 5, 64, scale=s), half(r, 5, 64)), {}, lambda a, b: a * b),
    "attn_softmax": (lambda r, s: (half(r, 2, 9, 9, scale=s),), {}, softmax16),
    "q_post_rope": (
        lambda r, s: (half(r, 5, 2, 8, scale=s), *(f(r.uniform(0, 6, (5, 8))).astype(HALF) for f in (np.cos, np.sin))),
        HEADS,
        rope16,
    ),
}


@pytest.mark.parametrize("name", HALVES)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 9999), exponent=st.integers(-26, 8))
def test_a_right_float16_kernel_is_within_its_bound_and_a_mutant_is_not(name: str, seed: int, exponent: int) -> None:
    arguments, options, kernel = HALVES[name]
    given_ = arguments(np.random.default_rng(seed), 2.0**exponent)
    with np.errstate(over="ignore", under="ignore"):
        oracle, out = consult(F16[name], given_, options), kernel(*given_, **options)
    assert judge(oracle, out)[0].passes
    largest = np.unravel_index(np.argmax(np.abs(out)), out.shape)
    out[largest] += 3 * np.spacing(out[largest])
    assert judge(oracle, out)[0] is Verdict.BUG


@pytest.mark.parametrize("kind", [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)])
def test_half_a_unit_is_half_the_way_to_the_next_number(kind: np.dtype) -> None:
    numbers = np.array([2.0**-14, 0.75, 1.0, 1.5, -2.0, 3.0], kind)
    below = np.abs(numbers - np.nextafter(numbers, kind.type(0))).astype(np.float64)  # at a power of two the nearer one
    found = noise.half_unit(numbers.astype(np.float64), kind)
    assert np.array_equal(found, below / 2)
    assert noise.half_unit(np.zeros(1), kind)[0] <= 2.0**-25


def test_float16_subnormals_count_and_flushing_them_is_a_bug() -> None:
    x = half(np.random.default_rng(0), 5, 64, scale=2.0**-12)
    oracle = consult(F16["ffn_swigl"], (x, x), {})
    assert judge(oracle, x * x)[0] is Verdict.EXACT
    flushed = np.where(np.abs(x * x) < 2.0**-14, HALF(0), x * x)
    assert judge(oracle, flushed)[0] is Verdict.BUG


def test_float16_overflow_is_not_finite_even_where_it_is_right() -> None:
    x = np.full((1, 4), 300, HALF)
    with np.errstate(over="ignore"):
        oracle, out = consult(F16["ffn_swigl"], (x, x), {}), x * x
        assert np.isinf(out).all()
        assert judge(oracle, out)[0] is Verdict.NONFINITE
        clamped = np.full_like(out, np.finfo(HALF).max)
        assert judge(oracle, clamped)[0] is Verdict.BUG


def test_a_number_where_the_inputs_give_none_is_never_right() -> None:
    """A NaN in the oracle compares with nothing, and must not hide what stands beside it."""
    declared = DECLARED["ffn_silu"]
    stage = dataclasses.replace(declared, dtype="float32")
    gate = np.ones((3, 8), np.float32)
    gate[1, 2] = np.nan
    oracle = consult(stage, (gate,), {})
    finite = np.nan_to_num(oracle.rounded)
    wrong = finite.copy()
    wrong[2] *= 3
    for observed in (finite, wrong, oracle.rounded):
        assert judge(oracle, observed) == (Verdict.NONFINITE, np.inf)
