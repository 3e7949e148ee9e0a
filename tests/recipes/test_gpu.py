"""What a right GPU computes is called right: products by an emulator of tensor cores, which tests/support has."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from forward_models import MODELS, tokens_of, write_model
from helpers import svf, tensors_of
from plain_forward import Plain
from recorded_models import recorded
from safetensors.numpy import save_file
from tensor_core import KINDS, STORED, UNITS, Array, Unit, in_pieces, in_slices, operands, product, stored, tf32

from stages.oracle import bounds
from stages.oracle.bounds import LAMBDA, U32
from stages.oracle.cores import AMPERE, HOPPER, NONE, VOLTA, WIDEST, cores_of
from stages.oracle.verdict import Oracle, Verdict, consult
from stages.recipes.side import SideVerdict
from stages.run.calibration import lambdas_of
from stages.spec.forward import DECLARED

GATE = DECLARED["ffn_gate"]
IDS = [f"{unit.device} {unit.format}" for unit in UNITS]
# How operands were rounded to TF32, in words; where none of them was a tie, both may be told.
NAMES = {"truncated": r"TF32-like \(truncated\)", "away": r"TF32-like \(ties away\)", "even": r"TF32-like(?! \()"}


def oracle_of(a: Array, b: Array, dtype: str, device: str | None) -> Oracle:
    """Of `a @ b` with operands stored in `dtype`, `[M, K]` and `[K, N]`."""
    lambdas = dataclasses.replace(LAMBDA, cores=cores_of(device))
    stage = dataclasses.replace(GATE, dtype=dtype)
    return consult(stage, (a.astype(STORED[dtype]), np.ascontiguousarray(b.T).astype(STORED[dtype])), {}, lambdas)


def judged(oracle: Oracle, result: Array) -> SideVerdict:
    side = SideVerdict()
    side.add(oracle, result.astype(STORED[oracle.stage.dtype]))
    return side


@pytest.mark.parametrize(
    ("device", "cores"),
    [
        ("cpu", NONE),
        (None, WIDEST),
        ("cuda: NVIDIA H200", HOPPER),
        ("gpu:1: NVIDIA H100 80GB HBM3", HOPPER),
        ("cuda: NVIDIA GB200", HOPPER),
        ("cuda: NVIDIA A100-SXM4-80GB", AMPERE),
        ("cuda: NVIDIA L40S", AMPERE),
        ("cuda: NVIDIA RTX 6000 Ada Generation", AMPERE),
        ("cuda: Tesla V100-SXM2-16GB", VOLTA),
        ("cuda: Tesla T4", VOLTA),
        ("cuda: AMD Instinct MI300X", WIDEST),
        ("gpu: NVIDIA Z900", WIDEST),
    ],
)
def test_the_tensor_cores_are_those_of_the_device(device: str | None, cores: object) -> None:
    assert cores_of(device) is cores


@pytest.mark.parametrize("unit", UNITS, ids=IDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_product_is_no_alarm(unit: Unit, kind: str) -> None:
    for k in (64, 256, 1024):
        a, b = operands(kind, 8, k, 24)
        if unit.format != "tf32":
            a, b = stored(a, unit.format), stored(b, unit.format)
            got = product(a, b, unit)
            for device in (f"cuda: {unit.device}", None):
                side = judged(oracle_of(a, b, unit.format, device), got)
                assert side.verdict.passes, (k, device, side)
            continue
        for how, device in (("truncated", None), ("away", f"cuda: {unit.device}"), ("even", None)):
            side = judged(oracle_of(a, b, "float32", device), product(tf32(a, how), tf32(b, how), unit))
            assert side.verdict is Verdict.PRECISION, (k, how, side)
            recipe = side.recipe or ""
            assert recipe.startswith("its operands have 10 mantissa bits, "), (k, how, side)
            assert re.search(NAMES[how], recipe), (k, how, side)
            assert ("truncated" in recipe) == (how == "truncated"), (k, how, side)


def test_a_deep_product_in_tf32_is_no_other_function() -> None:
    """Of one sign and cut off alike, all its values are one number times the right ones, but for what TF32 tells."""
    (a, b), unit = operands("offset", 8, 12288, 24), UNITS[-1]
    side = judged(oracle_of(a, b, "float32", None), product(tf32(a), tf32(b), unit))
    assert side.verdict is Verdict.PRECISION, side
    assert side.recipe == "its operands have 10 mantissa bits, TF32-like (truncated)"


@pytest.mark.parametrize("slices", [2, 4, 8, 16])
@pytest.mark.parametrize("unit", [unit for unit in UNITS if unit.format != "tf32"], ids=lambda unit: unit.format)
def test_a_split_k_in_the_output_s_format_is_named(unit: Unit, slices: int) -> None:
    # Of terms of one sign many slices are no further off than one accumulator.
    for kind in ("normal", "massive" if slices > 8 else "one sign"):
        a, b = (stored(x, unit.format) for x in operands(kind, 8, 1024, 24))
        for added in ("float32", unit.format):
            side = judged(oracle_of(a, b, unit.format, None), in_slices(a, b, unit, slices, unit.format, added))
            assert side.verdict is Verdict.PRECISION, (kind, added, side)
            assert f"partial sums of {slices} slices of K rounded to {unit.format}" in (side.recipe or ""), (kind, side)
            assert side.bits >= 0.98 * side.elements, (kind, added, side)


@pytest.mark.parametrize(
    "unit", [unit for unit in UNITS if unit.format in ("tf32", "bfloat16")], ids=lambda u: u.device
)
def test_float32_made_of_narrow_pieces_is_named(unit: Unit) -> None:
    narrow = tf32 if unit.format == "tf32" else lambda x: stored(x, "bfloat16")
    for k in (64, 256, 1024):
        a, b = operands("normal", 8, k, 24)
        for count, name in {2: "3xTF32"}.items() if unit.format == "tf32" else {2: "BF16x3", 3: "BF16x6"}.items():
            side = judged(oracle_of(a, b, "float32", None), in_pieces(a, b, unit, narrow, count))
            if name != "BF16x3" and side.elementwise is Verdict.ROUNDING:  # as good as float32; together perhaps not
                continue
            assert side.verdict is Verdict.PRECISION, (k, name, side)
            assert name in (side.recipe or ""), (k, side)


class OnTensorCores(Plain):
    """A forward whose products a tensor core sums, each in its own format."""

    unit: Unit

    def dot(self, a: Array, b: Array) -> Array:
        if a.ndim == 3:
            return np.stack([self.dot(x, y) for x, y in zip(a, b, strict=True)])
        narrow = tf32 if self.unit.format == "tf32" else lambda x: x
        return product(narrow(a), narrow(b), self.unit)


def audited(folder: Path, unit: Unit) -> Any:
    model = write_model(folder / "model", MODELS["qwen3-gqa4"], "bfloat16")
    weights = {k: v for file in model.glob("*.safetensors") for k, v in tensors_of(file).items()}
    dtype = "float32" if unit.format == "tf32" else unit.format
    plain, tokens = OnTensorCores(json.loads((model / "config.json").read_text()), weights, dtype), tokens_of(12)
    plain.unit = unit
    save_file(plain.run(tokens), folder / "dump.safetensors")
    ids = ",".join(map(str, tokens))
    done = svf("audit", folder / "dump.safetensors", "--model", model, "--tokens", ids, "--json")
    return json.loads(done.out)


@pytest.mark.parametrize("unit", UNITS, ids=IDS)
def test_a_right_forward_is_no_alarm(unit: Unit, tmp_path: Path) -> None:
    document = audited(tmp_path, unit)
    verdicts = {(row["stage"], row["verdict"], row["recipe"]) for row in document["rows"]}
    if unit.format != "tf32":
        assert document["outcome"] == "sound", document["verdict"]
        return
    narrower = {stage: recipe for stage, verdict, recipe in verdicts if verdict == "precision"}
    assert {verdict for _, verdict, _ in verdicts} == {"exact", "rounding", "precision"}, document["verdict"]
    assert {"attn_out", "ffn_gate", "ffn_out", "attn_scores"} < set(narrower)
    assert all(" 10 mantissa bits, TF32-like (truncated)" in recipe for recipe in narrower.values()), narrower


def test_no_tensor_core_loses_more_than_the_rigorous_bound() -> None:
    """1 beside products just below the last bit that is kept: on Volta twice what any order of float32 sums loses."""
    for unit in UNITS:
        a, b = np.full((1, 1024), 2.0**-11 * (1 - 2.0**-8), np.float32), np.full((1024, 1), 2.0**-12, np.float32)
        a[0, 0] = b[0, 0] = 1
        exact = a.astype(np.float64) @ b
        error = np.abs(product(a, b, unit) - exact)
        for device in (unit.device, "Z900"):
            core = cores_of(f"cuda: {device}")[unit.format]
            assert error <= bounds.product_rigorous(a, b, exact, core)
        if unit.device.startswith("Tesla V100"):
            assert error > bounds.product_rigorous(a, b, exact)


def test_the_rigorous_bound_is_a_tensor_core_s_where_the_operands_are_of_16_bits() -> None:
    a, b = (stored(x, "float16") for x in operands("normal", 8, 256, 24))
    bound = {device: oracle_of(a, b, "float16", device).rigorous() for device in (None, "cpu", "cuda: Tesla V100")}
    assert (bound["cpu"] <= bound[None]).all()
    assert (bound["cpu"] < bound[None]).any()
    assert np.array_equal(bound[None], bound["cuda: Tesla V100"])
    wide = {device: oracle_of(a, b, "float32", device).rigorous() for device in (None, "cpu")}
    assert np.array_equal(wide[None], wide["cpu"])


def at_the_limit(value: Array, units: float, rng: np.random.Generator) -> Array:
    """float64 values off by up to `units` u, of which rounding to float32 is one; those of the first tokens by all."""
    most = np.where(np.arange(len(value)) < 4, units - 1, 1.0).reshape(-1, *[1] * (value.ndim - 1))
    return (value * (1 + most * U32 * rng.choice([-1, 1], value.shape))).astype(np.float32)


def silu_of(gate: Array, rng: np.random.Generator, exponential: Callable[[Array], Array]) -> Array:
    total = (1 + exponential(-gate)).astype(np.float32)
    return at_the_limit(gate.astype(np.float64) / total, 5, rng)


def fast(x: Array) -> Array:
    """`__expf`: the argument times log2(e) rounded to float32, then 2 to that, within 3 u."""
    scaled = (x * np.float32(1.4426950408889634)).astype(np.float64)
    return at_the_limit(np.exp2(scaled), 4, np.random.default_rng(2))


def on(device: str | None, oracle: Oracle) -> Oracle:
    lambdas = dataclasses.replace(LAMBDA, cores=cores_of(device))
    return consult(oracle.stage, oracle.arguments, oracle.options, lambdas)


def table_limits() -> dict[str, tuple[Oracle, Array]]:
    """Stages whose functions err as much as CUDA's tables allow."""
    rng, source = np.random.default_rng(1), recorded("qwen3-gqa4", "float32", 40)
    found = {}
    for stage, f in (("rope_cos", np.cos), ("rope_sin", np.sin)):
        oracle = source.oracle((None, stage))
        found[stage] = oracle, at_the_limit(f(oracle.arguments[0].astype(np.float64)), 5, rng)
    oracle = source.oracle((1, "ffn_silu"))
    exact = lambda x: at_the_limit(np.exp(x.astype(np.float64)), 5, rng)  # noqa: E731
    found["ffn_silu"] = oracle, silu_of(oracle.arguments[0], rng, exact)
    oracle = source.oracle((1, "attn_norm"))
    x, w = oracle.arguments
    mean = np.mean(x * x, axis=-1, keepdims=True, dtype=np.float32) + np.float32(oracle.options["eps"])
    found["attn_norm"] = oracle, (x * at_the_limit(1 / np.sqrt(mean.astype(np.float64)), 5, rng)) * w
    return found


@pytest.mark.parametrize("stage", ["rope_cos", "rope_sin", "ffn_silu", "attn_norm"])
def test_functions_at_the_limit_of_cuda_s_table_are_rounding(stage: str) -> None:
    oracle, result = table_limits()[stage]
    for device in (None, "cuda: NVIDIA H200"):
        assert judged(on(device, oracle), result).verdict.passes, device


def test_on_a_cpu_no_row_of_a_gpu_holds() -> None:
    oracle, result = table_limits()["ffn_silu"]
    result[0] = (oracle.value[0] * (1 + 10.5 * U32)).astype(np.float32)  # its exponential and its quotient err alike
    assert judged(on(None, oracle), result).verdict is Verdict.ROUNDING
    assert not judged(on("cpu", oracle), result).verdict.passes
    a, b = (stored(x, "float16") for x in operands("one sign", 8, 1024, 24))
    got = product(a, b, UNITS[0])
    assert judged(oracle_of(a, b, "float16", None), got).verdict is Verdict.ROUNDING
    assert not judged(oracle_of(a, b, "float16", "cpu"), got).verdict.passes


def test_a_fast_exponential_is_named() -> None:
    source, rng = recorded("qwen3-gqa4", "float32", 40), np.random.default_rng(3)
    plain = source.oracle((1, "ffn_silu"))
    gate = (plain.arguments[0] * 12).astype(np.float32)
    oracle = consult(plain.stage, (gate,), plain.options)
    side = judged(oracle, silu_of(gate, rng, fast))
    assert side.verdict is Verdict.PRECISION, side
    assert "__expf" in (side.recipe or "")
    assert "__expf" not in (judged(on("cpu", oracle), silu_of(gate, rng, fast)).recipe or "")


def test_the_device_is_taken_from_the_facts() -> None:
    assert lambdas_of({"device": "cpu"}, "dump").cores is NONE
    assert lambdas_of({"device": "gpu:0: NVIDIA H100 80GB HBM3"}, "dump").cores is HOPPER
    assert lambdas_of({}, "dump").cores is WIDEST
    assert lambdas_of({"calibration": "2026-11-20: product 2.5/5", "device": "cpu"}, "dump").cores is NONE
