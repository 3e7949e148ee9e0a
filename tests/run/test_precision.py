"""Reference and exact precision: bits that no backend, chunk or order of a sum decides, and the bounds behind them."""

from __future__ import annotations

import ast
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import mpmath
import numpy as np
import pytest
from forward_models import (
    DYNAMIC,
    LLAMA3,
    LONGROPE,
    MODELS,
    YARN,
    MemoryWeights,
    Model,
    random_weights,
    tokens_of,
    write_model,
)
from helpers import ROOT, svf
from hypothesis import given, settings
from hypothesis import strategies as st
from replays import factors, make_offsets, task_of, whole

from stages.commands.backends import load_backend
from stages.errors import UsageError
from stages.judge.metrics import same_bits
from stages.oracle import bounds as noise
from stages.oracle import exact
from stages.oracle.exact import KINDS, NOISE, U64, Kind
from stages.oracle.rounding import round_once
from stages.run.forward import Forwarder
from stages.run.precision import LINEAR, PreciseBackend, linear_blocks, precision_fields, with_precision
from stages.spec.forward import DECLARED, ROUNDED_INSIDE
from stages.spec.noise import Noise
from stages.spec.replay import REPLAY

BACKENDS = ("torch", "jax", "reference")
F32, BF16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@functools.cache
def precise(name: str, mode: str = "exact") -> PreciseBackend:
    """One backend for all tests, so that a stage is compiled once per shape."""
    backend = with_precision(load_backend(name, "cpu"), mode)
    assert isinstance(backend, PreciseBackend)
    return backend


def stage_of(backend: PreciseBackend, name: str) -> Callable[..., np.ndarray]:
    return {**backend.replay, **backend.forward}[name]


# Arguments of every stage: small, of one shape, and of several kinds of number.

REGIMES: dict[str, Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "wide": lambda rng, shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-30, 30, shape),
    "subnormal": lambda rng, shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-140, -100, shape),
    "coarse": lambda rng, shape: rng.integers(-3, 4, shape) / 4,  # exact ties, sums that cancel, equal scores
    "zeros": lambda rng, shape: rng.standard_normal(shape) * rng.choice([0.0, -0.0, 1.0], shape),
}
HEADS = {"heads": 2, "kv_heads": 1, "head_dim": 8}
TOKENS, HIDDEN = 5, 12
Case = tuple[tuple[np.ndarray, ...], dict[str, Any]]


def case(name: str, seed: int, regime: str, dtype: np.dtype) -> Case:
    """Arguments and options of a stage."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int, kind: np.dtype = dtype) -> np.ndarray:
        return REGIMES[regime](rng, shape).astype(np.float32).astype(kind)

    heads, tokens = HEADS["heads"], TOKENS
    topk = rng.permuted(np.tile(np.arange(6), (tokens, 1)), axis=1)[:, :2].astype(np.int32)
    chosen = len(np.unique(topk))
    qkv, angle = 32, rng.uniform(0, 1, (tokens, 8)) * 2.0 ** rng.integers(-20, 16, (tokens, 8))
    norms = {"attn_norm", "ffn_norm", "final_norm"}
    linear = {"ffn_gate", "ffn_up", "ffn_out", "attn_out", "lm_head", "moe_logits", "shared_gate", "shared_up"}
    linear |= {"shared_out", "shared_score"}
    if name in norms:
        return (draw(tokens, HIDDEN), draw(HIDDEN)), {"eps": 1e-6}
    if name in linear:
        return (draw(tokens, HIDDEN), draw(7, HIDDEN)), {}
    if name in ("rope_cos", "rope_sin"):
        return (angle.astype(np.float32),), {"attention_scaling": 1.0 + (seed % 2) * 0.1386, "dtype": dtype.name}
    table: dict[str, Callable[[], Case]] = {
        "source_f32": lambda: ((draw(6, 5),), {}),
        "offsets_f32": lambda: ((draw(5),), {}),
        "scaled_s": lambda: ((draw(5), draw(5)), {}),
        "normalization": lambda: ((draw(9), draw(9)), {}),
        "u_scaled": lambda: ((draw(5), draw(6, 5)), {}),
        "matmul_pre_norm": lambda: ((draw(6, 5), draw(4, 5)), {"layout": "torch_v"}),
        "zero_source_f32": lambda: ((draw(6, 5), draw(5), draw(4, 5)), {"layout": "torch_v"}),
        "adapted_source_f32": lambda: ((draw(6, 4), draw(1)), {}),
        "final_f32": lambda: ((draw(6, 4),), {"transpose": bool(seed % 2)}),
        "final_bf16": lambda: ((draw(6, 4),), {}),
        # one sequence shorter, one longer than where dynamic and longrope change
        "inv_freq": lambda: ((np.array([(3, 700)[seed % 2]], np.int32),), rope_options(seed)),
        "rope_angle": lambda: ((np.abs(draw(4, kind=F32)), rng.integers(0, 40_000, tokens).astype(np.int32)), {}),
        "embedding": lambda: ((rng.integers(0, 6, tokens).astype(np.int32), draw(6, HIDDEN)), {}),
        "qkv_matmul": lambda: ((draw(tokens, HIDDEN), *(draw(n, HIDDEN) for n in (16, 8, 8))), {}),
        "qkv_bias": lambda: (
            (draw(tokens, HIDDEN), *(draw(n, HIDDEN) for n in (16, 8, 8)), *(draw(n) for n in (16, 8, 8))),
            {},
        ),
        "q_norm": lambda: ((draw(tokens, qkv), draw(8)), {**HEADS, "eps": 1e-6}),
        "k_norm": lambda: ((draw(tokens, qkv), draw(8)), {**HEADS, "eps": 1e-6}),
        "q_post_rope": lambda: ((draw(tokens, 2, 8), draw(tokens, 8), draw(tokens, 8)), HEADS),
        "k_post_rope": lambda: ((draw(tokens, qkv), draw(tokens, 8), draw(tokens, 8)), HEADS),
        "attn_scores": lambda: ((draw(tokens, 2, 8), draw(tokens, 1, 8)), {"scaling": 8**-0.5}),
        "attn_softmax": lambda: ((draw(heads, tokens, tokens),), {"window": (None, 3)[seed % 2]}),
        "attention": lambda: ((np.abs(draw(heads, tokens, tokens)), draw(tokens, qkv)), HEADS),
        "post_attn_residual": lambda: ((draw(tokens, HIDDEN), draw(tokens, HIDDEN)), {}),
        "ffn_silu": lambda: ((draw(tokens, HIDDEN),), {}),
        "ffn_swigl": lambda: ((draw(tokens, HIDDEN), draw(tokens, HIDDEN)), {}),
        "router_probs": lambda: ((draw(tokens, 6),), {}),
        "router_topk": lambda: ((np.abs(draw(tokens, 6, kind=F32)),), {"top_k": 2}),
        "router_weights": lambda: (
            (np.abs(draw(tokens, 6, kind=F32)), topk),
            {"renormalised": bool(seed % 2), "dtype": dtype.name},
        ),
        "expert_gate": lambda: ((draw(tokens, HIDDEN), topk, *(draw(chosen, 4, HIDDEN) for _ in range(2))), {}),
        "expert_up": lambda: ((draw(tokens, HIDDEN), topk, *(draw(chosen, 4, HIDDEN) for _ in range(2))), {}),
        "expert_silu": lambda: ((draw(tokens, 2, 8),), {}),
        "expert_swigl": lambda: ((draw(tokens, 2, 4), draw(tokens, 2, 4)), {}),
        "expert_out": lambda: ((draw(tokens, 2, 4), topk, draw(chosen, HIDDEN, 4)), {}),
        "moe_out": lambda: ((draw(tokens, 2, HIDDEN), topk, np.abs(draw(tokens, 2))), {}),
        "shared_silu": lambda: ((draw(tokens, 7),), {}),
        "shared_swigl": lambda: ((draw(tokens, 7), draw(tokens, 7)), {}),
        "shared_weight": lambda: ((draw(tokens, 1),), {}),
        "shared_gated": lambda: ((draw(tokens, 1), draw(tokens, HIDDEN)), {}),
        "moe_and_shared": lambda: ((draw(tokens, HIDDEN), draw(tokens, HIDDEN)), {}),
        "post_ffn_residual": lambda: ((draw(tokens, HIDDEN), draw(tokens, HIDDEN)), {}),
    }
    return table[name]()


def rope_options(seed: int) -> dict[str, Any]:
    kinds: list[tuple[str, dict[str, Any]]] = [("default", {}), ("linear", {"factor": 3.0})]
    kinds.append(("yarn", {**{k: v for k, v in YARN.items() if k not in ("rope_type", "rope_theta")}, "truncate": 1}))
    for rope in (DYNAMIC | {"original_max_position_embeddings": 64}, LONGROPE | {"attention_factor": 1.2}, LLAMA3):
        named = {k: tuple(v) if isinstance(v, list) else v for k, v in rope.items() if k != "rope_theta"}
        kinds.append((str(named.pop("rope_type")), named))
    rope_type, parameters = kinds[seed % 6]
    theta = (1e4, 1e6, 12345.678)[seed // 6 % 3]
    return {
        "head_dim": 32,
        "rope_theta": theta,
        "rope_type": rope_type,
        "rope_parameters": tuple(parameters.items()),
    }


def dtypes_of(name: str) -> tuple[np.dtype, ...]:
    return (F32, BF16) if name in DECLARED and DECLARED[name].dtype == "model" else (F32,)


EVERY = [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in [*REPLAY, *DECLARED] for dtype in dtypes_of(name)]
NUMBERS = {"seed": st.integers(0, 10_000), "regime": st.sampled_from(list(REGIMES))}


@pytest.mark.parametrize(("name", "dtype"), EVERY)
@settings(max_examples=8, deadline=None)  # each is computed on three backends
@given(**NUMBERS)
def test_exact_is_bit_identical_on_every_backend(name: str, dtype: np.dtype, seed: int, regime: str) -> None:
    arguments, options = case(name, seed, regime, dtype)
    first, *others = (stage_of(precise(backend), name)(*arguments, **options) for backend in BACKENDS)
    for other in others:
        assert same_bits(first, other), (first, other)


@pytest.mark.parametrize(
    ("name", "dtype"), [p for p in EVERY if NOISE[str(p.values[0])] not in (Noise.EXACT, Noise.CHOICE)]
)
@settings(max_examples=6, deadline=None)
@given(**NUMBERS)
def test_what_was_not_flagged_is_what_computing_it_again_gives(
    name: str, dtype: np.dtype, seed: int, regime: str
) -> None:
    arguments, options = case(name, seed, regime, dtype)
    found = stage_of(precise("jax"), name)(*arguments, **options)
    with np.errstate(all="ignore"):
        places = np.nonzero(np.isfinite(found))
        operands = exact._operands(name, arguments, options)
        again = KINDS[NOISE[name]].exact(places, found.dtype, *operands) if places[0].size else found[places]
    assert np.array_equal(found[places], again)


# Linear stages take their weights some rows at a time.

LINEAR_STAGES = [pytest.param(name, dtype, id=f"{name}-{dtype}") for name in sorted(LINEAR) for dtype in (F32, BF16)]


@pytest.mark.parametrize("limit", [1, 1000, 10_000, 10**9])
@pytest.mark.parametrize("lengths", [(7,), (16,), (152,), (64, 16, 16), (40, 24, 9)])
def test_blocks_are_every_row_once_and_its_column(lengths: tuple[int, ...], limit: int) -> None:
    starts = np.cumsum([0, *lengths])
    columns = [np.arange(a, b, dtype=np.float32) for a, b in itertools.pairwise(starts)]
    weights = [np.repeat(c[:, None], 12, axis=1) for c in columns]
    found = np.full(starts[-1], -1, np.float32)
    blocks = list(linear_blocks([*weights, *columns], limit))
    for rows, places in blocks:
        for weight, bias, place in zip(rows[: len(lengths)], rows[len(lengths) :], places, strict=True):
            assert weight.size
            assert np.array_equal(weight[:, 0], bias)
            assert (found[place] == -1).all()
            found[place] = bias
    assert np.array_equal(found, np.arange(starts[-1]))
    assert len(blocks) == 1 if limit == 10**9 else len(blocks) == min(lengths) // 8 or limit > 1 or min(lengths) < 8


@pytest.mark.cover(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "dtype"), LINEAR_STAGES)
def test_blocks_do_not_change_the_exact_bytes(
    name: str, dtype: np.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(3)
    shapes = ((32, 12), (16, 12), (16, 12)) if name.startswith("qkv") else ((48, 12),)
    weights = [rng.standard_normal(shape).astype(dtype) for shape in shapes]
    biases = [rng.standard_normal(shape[0]).astype(dtype) for shape in shapes] if name == "qkv_bias" else []
    stage = stage_of(precise(backend), name)
    arguments = (rng.standard_normal((5, 12)).astype(dtype), *weights, *biases)
    whole_result = stage(*arguments)
    monkeypatch.setattr("stages.run.precision.BLOCK_BYTES", 1)
    monkeypatch.setattr("stages.run.precision.BLOCK_INPUTS", 0)
    assert same_bits(stage(*arguments), whole_result)
    assert len(list(linear_blocks([*weights, *biases], 1))) > 1


# The bounds are sound: no backend's float64 value is further from the real number than E, by formulas of the test.


def real_values(name: str, arguments: tuple[np.ndarray, ...], options: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """Place and value in 200 bits or as a fraction, of some elements of a float32 stage."""
    wide = [a.astype(np.float64) for a in arguments]
    if name == "normalization":
        yield (0,), Fraction(*fraction_sum(wide[1])) / Fraction(*fraction_sum(wide[0]))
    elif name in ("matmul_pre_norm", "lm_head"):
        for i, j in np.ndindex(len(wide[0]), len(wide[1])):
            yield (i, j), sum(Fraction(x) * Fraction(y) for x, y in zip(wide[0][i], wide[1][j], strict=True))
    elif name == "attn_norm":
        for i, j in np.ndindex(*wide[0].shape):
            mean = sum(Fraction(x) ** 2 for x in wide[0][i]) / HIDDEN + Fraction(options["eps"])
            root = mpmath.sqrt(mpmath.mpf(mean.numerator) / mean.denominator)
            yield (i, j), mpmath.mpf(wide[0][i, j]) * wide[1][j] / root
    elif name == "attn_softmax":
        for h, i, j in np.ndindex(*wide[0].shape):
            first = max(0, i + 1 - (options["window"] or i + 1))
            row = {n: mpmath.exp(mpmath.mpf(wide[0][h, i, n])) for n in range(first, i + 1)}
            yield (h, i, j), row[j] / sum(row.values()) if j in row else mpmath.mpf(0)
    elif name == "ffn_silu":
        for at in np.ndindex(*wide[0].shape):
            yield at, mpmath.mpf(wide[0][at]) / (1 + mpmath.exp(-mpmath.mpf(wide[0][at])))
    elif name in ("rope_cos", "rope_sin"):
        function = mpmath.cos if name == "rope_cos" else mpmath.sin
        for at in np.ndindex(*wide[0].shape):
            yield at, function(mpmath.mpf(wide[0][at])) * mpmath.mpf(options["attention_scaling"])
    elif name == "inv_freq":
        yield from real_frequencies(int(arguments[0][-1]) + 1, **options)


def real_frequencies(
    length: int, head_dim: int, rope_theta: float, rope_type: str, rope_parameters: tuple[tuple[str, Any], ...]
) -> Iterator[tuple[Any, Any]]:
    rope, theta = dict(rope_parameters), mpmath.mpf(np.float32(rope_theta).item())
    original = rope.get("original_max_position_embeddings", 0)
    if rope_type == "dynamic" and length > original:
        scaled = mpmath.mpf(rope["factor"]) * length / original - (rope["factor"] - 1)
        theta *= scaled ** mpmath.mpf(head_dim / (head_dim - 2))
    for i in range(head_dim // 2):
        f = theta ** -mpmath.mpf(2 * i / head_dim)
        if rope_type == "linear":
            f /= rope["factor"]
        elif rope_type == "longrope":
            f /= mpmath.mpf(np.float32(rope["long_factor" if length > original else "short_factor"][i]).item())
        elif rope_type == "llama3":
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            share = (original * f / (2 * mpmath.mpf(math.pi)) - low) / mpmath.mpf(high - low)
            share = min(max(share, 0), 1)
            f = share * f + (1 - share) * f / rope["factor"]
        elif rope_type == "yarn":
            continue
        yield (i,), f


def fraction_sum(x: np.ndarray) -> tuple[int, int]:
    return sum((Fraction(v) for v in x), Fraction(0)).as_integer_ratio()


BOUNDED = ["normalization", "matmul_pre_norm", "lm_head", "attn_norm", "attn_softmax", "ffn_silu"]
BOUNDED += ["rope_cos", "rope_sin", "inv_freq"]


def largest_share(name: str, backend: str, seed: int, regime: str) -> float:
    """The largest |T - real| / E over the elements of a case; infinite where E = 0 and T is not the real number."""
    arguments, options = case(name, seed, regime, F32)
    value = precise(backend)._value(name, arguments, options, F32)
    with np.errstate(all="ignore"):
        error = KINDS[NOISE[name]].error(value, F32, *exact._operands(name, arguments, options))
    error, worst = np.broadcast_to(error, value.shape), 0.0
    with mpmath.workprec(400):
        for at, real in real_values(name, arguments, options) if np.isfinite(value).all() else ():
            if isinstance(real, Fraction):
                real = mpmath.mpf(real.numerator) / real.denominator
            off = float(abs(mpmath.mpf(value[at]) - real))
            worst = max(worst, off / error[at] if error[at] else math.inf if off > 1e-300 else 0.0)
    return worst


@pytest.mark.cover(1)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", BOUNDED)
def test_no_float64_value_is_further_from_the_real_one_than_e(name: str, backend: str) -> None:
    for seed in range(12 if name == "inv_freq" else 4):
        for regime in ("normal", "wide", "coarse"):
            assert largest_share(name, backend, seed, regime) <= 1, (seed, regime)


def test_the_test_of_e_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = KINDS[Noise.PRODUCT]
    small = Kind(lambda *operands: kind.error(*operands) / 1e3, kind.exact)
    monkeypatch.setattr(exact, "KINDS", {**KINDS, Noise.PRODUCT: small})
    monkeypatch.setitem(globals(), "KINDS", exact.KINDS)
    assert max(largest_share("lm_head", "torch", seed, "normal") for seed in range(4)) > 1


# Values beside a midpoint, which float64 cannot tell from it.


def beside_midpoint(dtype: np.dtype, side: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Factors whose exact product is a midpoint of `dtype` and `side` times 2^-90; and its right rounding."""
    half = 2.0**-24 if dtype == F32 else 2.0**-8
    a, b = np.array([[1, half, side * 2.0**-90]]), np.ones((1, 3))
    return a.astype(dtype), b.astype(dtype), 1 + 2 * half if side > 0 else 1.0


def check_midpoint(backend: str, name: str, dtype: np.dtype, side: int) -> None:
    a, b, expected = beside_midpoint(dtype, side)
    options = {"layout": "torch_v"} if name == "matmul_pre_norm" else {}
    found = stage_of(precise(backend), name)(a, b, **options)
    assert float(found[0, 0]) == expected


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("side", [-1, 0, 1])
def test_a_product_beside_a_midpoint_goes_to_its_own_side(backend: str, side: int) -> None:
    for name, dtype in (("matmul_pre_norm", F32), ("lm_head", F32), ("lm_head", BF16)):
        check_midpoint(backend, name, dtype, side)


def test_reference_alone_cannot_tell() -> None:
    a, b, expected = beside_midpoint(F32, 1)
    assert float(precise("torch", "reference").forward["lm_head"](a, b)[0, 0]) != expected


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mutant_that_skips_the_recomputation_is_caught(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def skip(places: Any, dtype: np.dtype, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return round_once((a.astype(np.float64) @ b)[places], dtype)

    mutant = {**KINDS, Noise.PRODUCT: Kind(KINDS[Noise.PRODUCT].error, skip)}
    monkeypatch.setattr(exact, "KINDS", mutant)
    with pytest.raises(AssertionError):
        check_midpoint(backend, "lm_head", F32, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_flagged_elements_are_counted_and_recomputed(backend: str) -> None:
    counting = with_precision(load_backend(backend, "cpu"), "exact")
    a, b, _ = beside_midpoint(F32, 1)
    counting.forward["lm_head"](np.concatenate((a, np.float32([[1, 2, 3]]))), b)
    fields = precision_fields(counting)
    assert fields["ziv"]["lm_head"] == {"elements": 2, "flagged": 1, "recomputed": 1, "corrected": 1}
    assert (fields["elements"], fields["flagged"], fields["recomputed"], fields["corrected"]) == (2, 1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_undecided_rounding_inside_a_stage_is_decided_exactly(backend: str) -> None:
    # The scores' product is a bfloat16 midpoint and a little more: one ulp after the scale, too.
    q = np.zeros((1, 1, 8), BF16)
    q[0, 0, :3] = [1, 2.0**-8, 2.0**-90]
    k = np.ones((1, 1, 8), BF16)
    up = float(precise(backend).forward["attn_scores"](q, k, scaling=0.5)[0, 0, 0])
    q[0, 0, 2] = 0
    tie = float(precise(backend).forward["attn_scores"](q, k, scaling=0.5)[0, 0, 0])
    assert (up, tie) == (0.5 * (1 + 2.0**-7), 0.5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_subnormal_probabilities_are_kept(backend: str) -> None:
    scores = np.float32([[[0, 0], [0, -100]]])
    found = precise(backend).forward["attn_softmax"](scores, window=None)
    assert found[0, 1, 1] == np.float32(math.exp(-100)) > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_sum_of_nothing_is_a_positive_zero_and_nan_is_one_nan(backend: str) -> None:
    stage = precise(backend).forward["lm_head"]
    zero = stage(np.float32([[-0.0, 1, -1]]), np.float32([[1, 1, 1], [1, 0, -0.0]]))
    assert zero.tobytes() == bytes(8)
    bad = stage(np.float32([[np.nan, np.inf, -np.inf]]), np.ones((1, 3), np.float32))
    assert bad.tobytes() == np.float32(np.nan).tobytes()


# Roundings inside a stage.


def test_a_prescribed_rounding_is_one_rounding() -> None:
    from svf_jax import wide as jax_wide
    from svf_torch import wide as torch_wide

    tie, above = 1 + 2.0**-8, 1 + 2.0**-8 + 2.0**-40  # float32 does not tell them apart
    x = np.array([tie, above, -above, 3 * tie, 1e-3, -2.5e38])
    expected = [1.0, 1 + 2.0**-7, -1 - 2.0**-7, *round_once(x[3:], BF16).astype(np.float64)]
    assert noise.prescribed(x, BF16).tolist() == expected
    for module, name in ((torch_wide, "torch"), (jax_wide, "jax")):
        inside = precise(name).inside
        rounded = inside.compile(functools.partial(module._rounded, dtype="bfloat16"))
        assert inside.get(rounded(inside.put(x))).tolist() == expected


def twin_functions(file: Path) -> list[tuple[str, list[str], str]]:
    return [
        (n.name, [a.arg for a in (*n.args.args, *n.args.kwonlyargs)], (ast.get_docstring(n) or "").split("\n")[0])
        for n in ast.parse(file.read_text()).body
        if isinstance(n, ast.FunctionDef)
    ]


def test_the_wide_twins_are_alike_and_complete() -> None:
    one, other = (twin_functions(ROOT / package / "wide.py") for package in ("svf_torch", "svf_jax"))
    assert one == other
    for backend in BACKENDS:
        assert {*REPLAY, *DECLARED} <= precise(backend).wide.keys()
    assert {name for name, arguments, _ in one if "dtype" in arguments} >= ROUNDED_INSIDE


def test_float64_in_jax_stays_within_the_backend() -> None:
    a, b, _ = beside_midpoint(F32, 1)
    precise("jax").forward["lm_head"](a, b)
    assert jnp.asarray(np.ones(2)).dtype == np.float32


def test_there_is_no_other_precision() -> None:
    with pytest.raises(UsageError, match="native, reference, exact"):
        with_precision(load_backend("reference", "cpu"), "double")


# Whole runs.


@pytest.mark.cover(1)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", ["qwen3-yarn", "qwen2-linear", "qwen2-moe", "mistral"])
def test_forwards_are_bit_identical_in_all_stages_of_all_layers(model: str, dtype: str) -> None:
    config = MODELS[model].config(dtype)
    weights = MemoryWeights(random_weights(config, 3))
    runs = [list(Forwarder(precise(name), config, weights).run(tokens_of(12))) for name in BACKENDS]
    for first, *others in zip(*runs, strict=True):
        assert all(same_bits(first.array, other.array) for other in others), (first.layer, first.stage)


@pytest.mark.cover(1)
@pytest.mark.parametrize("mode", ["reference", "exact"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_chunks_of_rows_change_no_bit(name: str, mode: str) -> None:
    u, s, v = factors(97, 64, 0)
    task = task_of(u, s, v, make_offsets("mixed", s.size, 0))
    expected = whole(precise(name, mode), task)
    for rows in (16, 31, 64):
        found = whole(precise(name, mode), task, rows)
        assert [stage for stage in REPLAY if not same_bits(found[stage], expected[stage])] == []


@pytest.mark.cover(1)
@pytest.mark.parametrize("mode", ["reference", "exact"])
@pytest.mark.parametrize("name", ["torch", "jax"])
def test_chunks_of_the_vocabulary_change_no_bit(name: str, mode: str) -> None:
    config = Model(vocab=9000, layers=1).config("bfloat16")
    weights = MemoryWeights(random_weights(config))
    forwarder = Forwarder(precise(name, mode), config, weights)
    one, two = ([r.array for r in forwarder.run([1, 2, 3], stages=["lm_head"], lm_head_chunk=c)] for c in (4096, 9000))
    assert same_bits(one[0], two[0])


# The command line.


def test_replay_passes_its_gate_in_exact() -> None:
    result = svf("replay", "--backend", "both", "--precision", "exact", "--strict-current-python", "--json")
    document = result.json
    assert result.code == 0, document["verdict"]
    assert sum(row["mismatched"] for row in document["rows"]) == 0
    assert document["precision"] == "exact"
    for side in ("a", "b"):
        run = document[side]["run"]
        assert run["flagged"] == run["recomputed"] == sum(c["flagged"] for c in run["ziv"].values())
        assert document[side]["facts"]["precision"] == "exact"


def test_so_does_the_golden_bundle(golden: Path) -> None:
    bundle = golden / "trinity-tiny" / "python_components"
    result = svf("replay", bundle, "--precision", "exact", "--strict-current-python", "--json")
    assert result.code == 0, result.json["verdict"]
    assert sum(row["mismatched"] for row in result.json["rows"]) == 0


@pytest.mark.parametrize("family", ["qwen3", "qwen2"])
def test_forward_on_both_is_bit_identical_in_exact(family: str, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", MODELS[family], "bfloat16")
    dtype = {"qwen3": "float32", "qwen2": "bfloat16"}[family]
    result = svf("forward", model, "--precision", "exact", "--dtype", dtype, "--json")
    assert result.code == 0, result.json["verdict"]
    assert sum(row["mismatched"] for row in result.json["rows"]) == 0
    assert not result.json["a"]["run"]["production"]["ran"]


def test_a_dump_records_its_precision_and_a_diff_says_when_they_differ(model: Path, tmp_path: Path) -> None:
    for precision in ("native", "exact"):
        run = ("forward", model, "--backend", "reference", "--no-production", "--precision", precision)
        assert svf(*run, "--out", tmp_path / precision).code == 0
    manifest = (tmp_path / "exact" / "manifest.json").read_text()
    assert '"precision": "exact"' in manifest
    words = "a was computed in native, b in exact"
    assert words in svf("diff", tmp_path / "native", tmp_path / "exact", "--json").json["verdict"]
    assert "precision" not in svf("diff", tmp_path / "native", tmp_path / "native", "--json").json["verdict"]


def test_what_precision_cannot_go_with_is_a_usage_error() -> None:
    for more in (("--production",), ("--jit", "layer", "--backend", "jax")):
        result = svf("forward", "--precision", "exact", *more)
        assert result.code == 2
        assert "--precision exact" in result.error
    assert svf("replay", "--precision", "double").code == 2


def test_u_is_that_of_float64() -> None:
    assert np.finfo(np.float64).eps / 2 == U64
