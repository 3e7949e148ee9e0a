"""The forward in float16, whose range ends where weights and activations live: on both backends and from elsewhere."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from forward_models import MODELS, MemoryWeights, dumped, random_weights, tokens_of, trace, write_model
from helpers import svf

from stages.commands.backends import load_backend
from stages.files.tensorfile import write_tensors
from stages.run.forward import Forwarder, judge_stage, recorded_inputs


def run(name: str, family: str, tokens: int, precision: str = "native") -> dict[tuple[int | None, str], np.ndarray]:
    config = MODELS[family].config("float16")
    weights = MemoryWeights(random_weights(config, tokens))
    runner = Forwarder(load_backend(name, "cpu", precision), config, weights)
    return {(r.layer, r.stage): r.array for r in runner.run(tokens_of(tokens))}


@pytest.mark.cover(1)
@pytest.mark.parametrize("name", ["torch", "jax"])
@pytest.mark.parametrize(("family", "tokens"), [("qwen3", 64), ("qwen2", 7)])
def test_every_float16_stage_is_exact_or_rounding(name: str, family: str, tokens: int) -> None:
    model = MODELS[family]
    config = model.config("float16")
    weights = MemoryWeights(random_weights(config, tokens))
    runner = Forwarder(load_backend(name, "cpu"), config, weights)
    recorded = {(r.layer, r.stage): r.array for r in runner.run(tokens_of(tokens))}
    for (layer, stage_name), observed in recorded.items():
        stage = runner.path[stage_name]
        inputs = recorded_inputs(runner.path, stage, recorded, tokens_of(tokens), layer, model.layers)
        assert inputs is not None
        side = judge_stage(runner.path, config, stage, inputs, weights, observed, layer)
        assert side.verdict.passes, (layer, stage_name, side)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_jax_rounds_to_float16_once_and_keeps_its_subnormals(dtype: type) -> None:
    import jax
    import jax.numpy as jnp

    from svf_jax.decoder import _reduced

    rng = np.random.default_rng(0)
    x = (rng.standard_normal(20_000) * 2.0 ** rng.integers(-30, 16, 20_000)).astype(dtype)
    half = np.float16(1) + np.float16(2.0**-10)
    x[:4] = [2.0**-25, 3 * 2.0**-25, 2.0**-14 * (1 - 2.0**-11), half]  # ties among subnormals, and at their end
    with jax.enable_x64(dtype is np.float64), np.errstate(over="ignore"):
        out = np.asarray(jax.jit(lambda v: _reduced(v, jnp.dtype(jnp.float16)))(x))
        assert out.dtype == dtype
        assert np.array_equal(out, x.astype(np.float16).astype(dtype))
        flushed = np.where(np.abs(x) < 2.0**-14, 0, x.astype(np.float16))
    assert not np.array_equal(out, flushed)  # what lax.reduce_precision alone gives


def test_float16_in_exact_precision_is_the_same_on_all_backends() -> None:
    torch, jax, reference = (run(name, "qwen3", 9, "exact") for name in ("torch", "jax", "reference"))
    assert [place for place in reference if not np.array_equal(torch[place], reference[place])] == []
    assert [place for place in reference if not np.array_equal(jax[place], reference[place])] == []


@pytest.mark.parametrize("wide", [False, True], ids=["stored as float16", "upcast to float32"])
def test_a_foreign_float16_forward_is_audited_and_its_fault_named(tmp_path: Path, wide: bool) -> None:
    model = write_model(tmp_path / "model", MODELS["qwen3"], "float16")
    trace(model, load_backend("torch", "cpu"), out=tmp_path / "ours", tokens="3,141,59")
    tensors = {key: a.astype(np.float32) if wide else a for key, a in dumped(tmp_path / "ours").items()}
    given = ("--model", model, "--tokens", "3,141,59", "--json")
    write_tensors(tmp_path / "right.safetensors", tensors)
    right = svf("audit", tmp_path / "right.safetensors", *given)
    assert (right.code, right.json["outcome"]) == (0, "sound"), right.json["verdict"]
    assert right.json["facts"]["dtype"] == "float16"
    right_silu = tensors["layers.0.ffn_silu"]
    tensors["layers.0.ffn_silu"] = (right_silu * 1.0625).astype(np.float16).astype(right_silu.dtype)
    write_tensors(tmp_path / "wrong.safetensors", tensors)
    wrong = svf("audit", tmp_path / "wrong.safetensors", *given)
    assert wrong.code == 1
    assert wrong.json["culprit"]["stage"] == "ffn_silu"


def test_forward_takes_float16(tmp_path: Path) -> None:
    document = svf("forward", "--backend", "torch", "--dtype", "float16", "--no-production", "--json").json
    assert document["dtype"] == "float16"
