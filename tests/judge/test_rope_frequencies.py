"""Every right way to make RoPE's inverse frequencies is within their bound, and none with fewer bits is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from forward_models import DYNAMIC, LINEAR, LLAMA3, LONGROPE, YARN

from stages.oracle import bounds as noise
from stages.oracle.verdict import Verdict, consult
from stages.recipes.side import SideVerdict
from stages.spec.forward import DECLARED
from stages.spec.stage import Stage
from svf_jax.backend import JaxBackend
from svf_torch.backend import TorchBackend

F32 = np.float32
STAGE: Stage = DECLARED["inv_freq"]
DEFAULT = {"rope_type": "default", "rope_theta": 1e6}
TYPES = [DEFAULT, LINEAR, YARN, YARN | {"truncate": False}, DYNAMIC, LONGROPE, LLAMA3]
LENGTHS = (7, 65, 66, 700, 40_000)


def options_of(rope: dict[str, Any], head_dim: int) -> dict[str, Any]:
    table: dict[str, Any] = {k: v for k, v in rope.items() if k not in ("rope_type", "rope_theta")}
    if rope["rope_type"] == "yarn":
        table = {"truncate": True, **table}
    if rope["rope_type"] == "dynamic":
        table["original_max_position_embeddings"] = 64
    if rope["rope_type"] == "longrope":
        table |= {k: tuple(np.resize(table[k], head_dim // 2).tolist()) for k in ("short_factor", "long_factor")}
    return {
        "head_dim": head_dim,
        "rope_theta": rope["rope_theta"],
        "rope_type": rope["rope_type"],
        "rope_parameters": tuple(sorted(table.items())),
    }


def judged(inv_freq: np.ndarray, options: dict[str, Any], length: int) -> SideVerdict:
    verdict = SideVerdict()
    verdict.add(consult(STAGE, (np.array([length - 1], np.int32),), options), np.asarray(inv_freq, F32))
    return verdict


# theta and head_dim -> frequencies without scaling, as programs make them.
WAYS: dict[str, Callable[[float, int], np.ndarray]] = {
    "float32 power": lambda t, d: F32(1) / F32(t) ** (np.arange(0, d, 2, dtype=F32) / F32(d)),
    "negative float32 power": lambda t, d: F32(t) ** (-(np.arange(0, d, 2, dtype=F32) / F32(d))),
    "exp of a float32 logarithm": lambda t, d: np.exp(-(np.arange(0, d, 2, dtype=F32) / F32(d)) * np.log(F32(t))),
    "exp, the logarithm divided first": lambda t, d: np.exp(np.arange(0, d, 2, dtype=F32) * (-np.log(F32(t)) / F32(d))),
    "exp2 of a float32 logarithm": lambda t, d: np.exp2(-(np.arange(0, d, 2, dtype=F32) / F32(d)) * np.log2(F32(t))),
    "float64": lambda t, d: t ** (-np.arange(0, d, 2) / d),
    "multiplied up": lambda t, d: np.cumprod(np.r_[F32(1), np.full(d // 2 - 1, F32(t ** (-2 / d)))], dtype=F32),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_right_way_is_within_the_calibrated_bound(way: str) -> None:
    for theta in (1e4, 5e5, 1e6, 5e6, 1e7, 12345.678):
        for head_dim in (8, 24, 32, 48, 64, 80, 96, 128, 256):
            found = judged(WAYS[way](theta, head_dim), options_of(DEFAULT | {"rope_theta": theta}, head_dim), 7)
            assert found.verdict.passes, (theta, head_dim, found)


@pytest.mark.cover(1)
@pytest.mark.parametrize("head_dim", [8, 32, 80, 128])
@pytest.mark.parametrize("rope", TYPES, ids=lambda rope: f"{rope['rope_type']}{len(rope)}")
def test_every_scaling_is_right_on_torch_on_jax_and_in_float64(rope: dict[str, Any], head_dim: int) -> None:
    for length in LENGTHS:
        options, last = options_of(rope, head_dim), np.array([length - 1], np.int32)
        for backend in (TorchBackend(), JaxBackend()):
            made = backend.compile(lambda p, b=backend, o=options: b.forward["inv_freq"](p, **o))
            found = judged(backend.get(made(backend.put(last))), options, length)
            assert found.verdict.passes, (backend.name, length, found)
        exact = consult(STAGE, (last,), options).rounded
        for narrow in (ml_dtypes.bfloat16, np.float16):
            lost = judged(exact.astype(narrow).astype(F32), options, length)
            assert lost.verdict in (Verdict.PRECISION, Verdict.BUG), (narrow, length, lost)


def test_another_length_or_another_factor_is_another_function() -> None:
    short, long = (np.array([n - 1], np.int32) for n in (64, 65))
    for rope in (DYNAMIC, LONGROPE):
        options = options_of(rope, 32)
        of_short, of_long = (consult(STAGE, (last,), options).rounded for last in (short, long))
        assert judged(of_short, options, 64).verdict is judged(of_long, options, 65).verdict is Verdict.EXACT
        assert judged(of_short, options, 65).verdict is judged(of_long, options, 64).verdict is Verdict.BUG
    as_original = dict(LLAMA3) | {"factor": 8.0}
    found = judged(consult(STAGE, (short,), options_of(as_original, 32)).rounded, options_of(LLAMA3, 32), 64)
    assert found.verdict is Verdict.BUG


def test_the_bound_is_of_few_ulps_where_the_frequency_is_high() -> None:
    oracle = consult(STAGE, (np.array([0], np.int32),), options_of(DEFAULT, 128))
    units = oracle.bound / (noise.U32 * oracle.value)
    assert units[0] == pytest.approx(6)
    assert units.max() < 200  # of bfloat16's 65,536
    assert (oracle.rigorous() >= oracle.bound).all()
